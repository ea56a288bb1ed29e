"""Models that learn to answer."""

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.training.config import Experiment, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig


def arithmetic() -> Experiment:
    """A small Transformer that answers arithmetic word problems at once, step by step, and by a program."""
    block = BlockConfig(mixer=AttentionConfig(heads=4, head_dim=24, qk_norm=True), channel=GatedMLPConfig())
    return Experiment(
        name="arithmetic",
        model=ModelConfig(width=96, layers=3, pattern=(block,)),
        data=DataConfig(source="arithmetic:6000", template="plain", validation="arithmetic:200", sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loop=LoopConfig(steps=1500, batch_size=8, eval_every=500, checkpoint_every=500, log_every=50),
    )
