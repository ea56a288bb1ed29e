"""Models that learn to answer."""

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.training.config import Experiment, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig


def arithmetic() -> Experiment:
    """A small Transformer that answers arithmetic word problems at once, step by step, and by a program.

    After `phyla train arithmetic`, `phyla evaluate RUN --protocol pal --problems 240 --max-tokens 96` finds 240 of 240
    right, cot 12 and direct 7: it can read a problem long before it can calculate.
    """
    block = BlockConfig(mixer=AttentionConfig(heads=4, head_dim=32, qk_norm=True), channel=GatedMLPConfig())
    return Experiment(
        name="arithmetic",
        model=ModelConfig(width=128, layers=3, pattern=(block,)),
        data=DataConfig(
            source="arithmetic:10000",
            validation="arithmetic:200",
            template="plain",
            tokenizer="bpe:640",
            sequence_length=128,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loop=LoopConfig(steps=800, batch_size=16, eval_every=200, checkpoint_every=200),
    )
