"""Small models on the embedded corpus: a few minutes each on two CPU cores."""

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.training.config import Experiment, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig


def transformer() -> Experiment:
    """A Llama-like Transformer: RoPE, RMSNorm, SwiGLU.

    `phyla train transformer`
    """
    block = BlockConfig(mixer=AttentionConfig(heads=4, head_dim=32), channel=GatedMLPConfig())
    return _small("transformer", width=152, layers=4, block=block)


def mamba() -> Experiment:
    """A Mamba-1: mixers only.

    `phyla train mamba`
    """
    return _small("mamba", width=176, layers=4, block=BlockConfig(mixer=MambaConfig()))


def _small(name: str, *, width: int, layers: int, block: BlockConfig) -> Experiment:
    return Experiment(
        name=name,
        model=ModelConfig(width=width, layers=layers, pattern=(block,)),
        data=DataConfig(source="austen", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loop=LoopConfig(steps=500, batch_size=16, eval_every=100, checkpoint_every=100),
    )
