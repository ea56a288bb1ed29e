"""Small models on the embedded corpus: a few minutes each on two CPU cores."""

import dataclasses
from typing import Any

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mlstm import MLSTMConfig
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mlp import GatedMLPConfig
from phyla.models.moe import MoEConfig
from phyla.training.config import Experiment, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig


def transformer() -> Experiment:
    """A Transformer as in Qwen 3: RoPE, RMSNorm also of queries and keys, SwiGLU.

    `phyla train transformer`: a minute on two CPU cores, 2.61 bits per byte on Persuasion.
    """
    block = BlockConfig(mixer=AttentionConfig(heads=4, head_dim=32, qk_norm=True), channel=GatedMLPConfig())
    return _small("transformer", 160, block)


def mamba() -> Experiment:
    """A Mamba-1: mixers only.

    `phyla train mamba`: a minute and a half on two CPU cores, 2.10 bits per byte on Persuasion.
    """
    return _small("mamba", 204, BlockConfig(mixer=MambaConfig()))


def jamba() -> Experiment:
    """A Jamba: of four blocks one has attention, the others Mamba; every second has four experts, of which two work."""
    attention = AttentionConfig(heads=4, head_dim=32, positions="none")
    mamba, dense = MambaConfig(norms=True), GatedMLPConfig(expand=1.0)
    experts = MoEConfig(experts=4, top_k=2, expand=1.0, weights="softmax_of_all", balance_loss=1e-3)
    return _small(
        "jamba",
        145,
        *(BlockConfig(mixer=attention if i == 2 else mamba, channel=experts if i % 2 else dense) for i in range(4)),
    )


def rwkv() -> Experiment:
    """An RWKV-7 "Goose"."""
    mixer = RWKV7Config(head_dim=32, decay_rank=16, rate_rank=16, value_rank=16, gate_rank=32)
    first = BlockConfig(mixer=dataclasses.replace(mixer, value_residual=False), channel=RWKV7ChannelConfig(expand=3.0))
    block = BlockConfig(mixer=mixer, channel=first.channel)
    return _small("rwkv", 160, block, prefix=(first,), norm="layernorm", embedding_norm=True)


def xlstm() -> Experiment:
    """An xLSTM of the blocks of xLSTM-7B: mLSTM and SwiGLU, gates and logits softly capped."""
    return _small("xlstm", 160, BlockConfig(mixer=MLSTMConfig(), channel=GatedMLPConfig()), logit_cap=30.0)


def _small(name: str, width: int, *pattern: BlockConfig, **fields: Any) -> Experiment:
    return Experiment(
        name=name,
        model=ModelConfig(width=width, layers=4, pattern=pattern, **fields),
        data=DataConfig(source="austen", sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loop=LoopConfig(steps=250, batch_size=8, eval_every=50, checkpoint_every=125),
    )
