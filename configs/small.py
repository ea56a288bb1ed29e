"""Small models on the embedded corpus: a few minutes each on two CPU cores."""

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.training.config import Experiment, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig


def transformer() -> Experiment:
    """A Transformer as in Qwen 3: RoPE, RMSNorm also of queries and keys, SwiGLU.

    `phyla train transformer`: two and a half minutes on two CPU cores, 2.13 bits per byte on Persuasion.
    """
    block = BlockConfig(mixer=AttentionConfig(heads=4, head_dim=32, qk_norm=True), channel=GatedMLPConfig())
    return _small("transformer", width=160, block=block)


def mamba() -> Experiment:
    """A Mamba-1: mixers only.

    `phyla train mamba`: three minutes on two CPU cores, 1.96 bits per byte on Persuasion.
    """
    return _small("mamba", width=204, block=BlockConfig(mixer=MambaConfig()))


def _small(name: str, *, width: int, block: BlockConfig) -> Experiment:
    return Experiment(
        name=name,
        model=ModelConfig(width=width, layers=4, pattern=(block,)),
        data=DataConfig(source="austen", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loop=LoopConfig(steps=600, batch_size=8, eval_every=100, checkpoint_every=100),
    )
