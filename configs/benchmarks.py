"""What `phyla bench models` measures: one function for each architecture, all of the same width, depth and vocabulary.

Each is what transformers makes of the same flags, so that its PyTorch model can be the peer.
"""

from collections.abc import Callable
from typing import Any

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mlstm import MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.moe import MoEConfig
from phyla.training.bench.models import Architecture

HEADS = 4
POSITIONS = 512


def llama() -> Architecture:
    """RoPE, RMSNorm, SwiGLU."""
    block = BlockConfig(mixer=AttentionConfig(heads=HEADS), channel=GatedMLPConfig(expand=688 / 256))
    return Architecture(_model(block, tie_embeddings=False), "llama")


def gpt2() -> Architecture:
    """Learned positions, LayerNorm, GELU, biases."""
    mixer = AttentionConfig(heads=HEADS, positions="none", qkv_bias=True, out_bias=True)
    block = BlockConfig(mixer=mixer, channel=MLPConfig(activation="gelu_tanh", bias=True))
    return Architecture(_model(block, norm="layernorm", learned_positions=POSITIONS), "gpt2")


def bloom() -> Architecture:
    """ALiBi."""
    mixer = AttentionConfig(heads=HEADS, positions="alibi", qkv_bias=True, out_bias=True)
    block = BlockConfig(mixer=mixer, channel=MLPConfig(activation="gelu_tanh", bias=True))
    return Architecture(_model(block, norm="layernorm", embedding_norm=True), "bloom")


def mixtral() -> Architecture:
    """Two of eight experts for each token."""
    block = BlockConfig(mixer=AttentionConfig(heads=HEADS), channel=MoEConfig(experts=8, top_k=2, expand=1.0))
    return Architecture(_model(block, tie_embeddings=False), "mixtral")


def bert() -> Architecture:
    """An encoder: nothing to decode; it is trained on all tokens."""
    mixer = AttentionConfig(heads=HEADS, positions="none", causal=False, qkv_bias=True, out_bias=True)
    model = _model(
        BlockConfig(mixer=mixer, channel=MLPConfig(bias=True)),
        norm="layernorm",
        norm_position="post",
        final_norm=False,
        learned_positions=POSITIONS,
        token_types=2,
        embedding_norm=True,
        head_transform="gelu",
        head_bias=True,
    )
    return Architecture(model, "bert")


def xlstm() -> Architecture:
    """The block of xLSTM-7B."""
    mixer, channel = MLSTMConfig(heads=HEADS), GatedMLPConfig(expand=2.667, round_to=64)
    block = BlockConfig(mixer=mixer, channel=channel)
    return Architecture(_model(block, norm_epsilon=1e-6, tie_embeddings=False, logit_cap=30.0), "xlstm")


def mamba2() -> Architecture:
    """Mamba-2."""
    return Architecture(_model(BlockConfig(mixer=Mamba2Config())), "mamba2")


def mamba() -> Architecture:
    """Mamba-1."""
    return Architecture(_model(BlockConfig(mixer=MambaConfig())), "mamba")


def jamba() -> Architecture:
    """Three Mambas, one attention; every other block has experts."""
    scan, experts = MambaConfig(norms=True), MoEConfig(experts=8, top_k=2, expand=1.0, weights="softmax_of_all")
    dense = GatedMLPConfig(expand=1.0)
    blocks = (
        BlockConfig(mixer=scan, channel=dense),
        BlockConfig(mixer=scan, channel=experts),
        BlockConfig(mixer=AttentionConfig(heads=HEADS, positions="none"), channel=dense),
        BlockConfig(mixer=scan, channel=experts),
    )
    return Architecture(_model(*blocks, tie_embeddings=False), "jamba")


def rwkv4() -> Architecture:
    """RWKV-4, the one that transformers has."""
    block = BlockConfig(mixer=RWKV4Config(), channel=RWKV4ChannelConfig())
    return Architecture(_model(block, norm="layernorm", embedding_norm=True, tie_embeddings=False), "rwkv")


def rwkv7() -> Architecture:
    """RWKV-7; transformers has none."""
    first = BlockConfig(mixer=RWKV7Config(value_residual=False), channel=RWKV7ChannelConfig())
    block = BlockConfig(mixer=RWKV7Config(), channel=RWKV7ChannelConfig())
    model = _model(block, prefix=(first,), norm="layernorm", embedding_norm=True, tie_embeddings=False)
    return Architecture(model, None)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bloom": bloom,
    "mixtral": mixtral,
    "bert": bert,
    "xlstm": xlstm,
    "mamba2": mamba2,
    "mamba": mamba,
    "jamba": jamba,
    "rwkv4": rwkv4,
    "rwkv7": rwkv7,
}


def _model(*blocks: BlockConfig, **fields: Any) -> ModelConfig:
    return ModelConfig(width=256, layers=4, vocab_size=4096, pattern=blocks, **fields)
