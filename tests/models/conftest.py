"""The architectures that the contract suite runs over: each mixer of the registry, and patterns of them."""

import pytest

from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.registry import LAYERS


def model(*blocks: tuple[LayerConfig, LayerConfig | None], **fields) -> ModelConfig:
    """A small model of these blocks, twice."""
    pattern = tuple(BlockConfig(mixer=mixer, channel=channel) for mixer, channel in blocks)
    return ModelConfig(**{"width": 16, "layers": 2 * len(pattern), "vocab_size": 31, "pattern": pattern} | fields)


ATTENTION = AttentionConfig(heads=4, kv_heads=2)
MAMBA = MambaConfig(state=4)
ARCHITECTURES = {
    "attention": model((ATTENTION, GatedMLPConfig())),
    "attention-learned": model(
        (AttentionConfig(positions="none", qkv_bias=True, out_bias=True), MLPConfig(bias=True)),
        norm="layernorm",
        learned_positions=64,
        tie_embeddings=False,
    ),
    "attention-alibi-window": model((AttentionConfig(positions="alibi", window=5, qk_norm=True), MLPConfig())),
    "attention-post": model(
        (ATTENTION, MLPConfig(bias=True)),
        layers=5,
        groups=2,
        prefix=(BlockConfig(mixer=ATTENTION, channel=None),),
        norm="layernorm",
        norm_bias=False,
        norm_position="post",
        final_norm=False,
        embedding_width=8,
        embedding_norm=True,
        token_types=2,
        head_transform="gelu_tanh",
        head_bias=True,
        logit_cap=3.0,
    ),
    "attention-factorised": model((ATTENTION, None), embedding_width=8, groups=1, token_types=2),
    "mamba": model((MAMBA, None)),
    "hybrid": model((MAMBA, None), (ATTENTION, MLPConfig(activation="relu_squared"))),
}


def covered() -> set[type]:
    """Every kind of layer in the suite."""
    blocks = [block for config in ARCHITECTURES.values() for block in config.pattern]
    return {type(layer) for block in blocks for layer in (block.mixer, block.channel)}


assert set(LAYERS.values()) <= covered(), "a registered layer is missing from the contract suite"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> ModelConfig:
    """Each in turn."""
    return ARCHITECTURES[request.param]
