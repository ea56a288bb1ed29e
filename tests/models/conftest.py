"""The architectures that the contract suite runs over: each mixer of the registry, and patterns of them."""

import dataclasses

import pytest

from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6ChannelConfig, RWKV6Config
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.moe import MoEConfig
from phyla.models.registry import LAYERS


def model(*blocks: tuple[LayerConfig, LayerConfig | None], **fields) -> ModelConfig:
    """A small model of these blocks, twice."""
    pattern = tuple(BlockConfig(mixer=mixer, channel=channel) for mixer, channel in blocks)
    return ModelConfig(**{"width": 16, "layers": 2 * len(pattern), "vocab_size": 31, "pattern": pattern} | fields)


ATTENTION = AttentionConfig(heads=4, kv_heads=2)
MAMBA = MambaConfig(state=4)
RWKV7 = RWKV7Config(head_dim=8, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6)
RWKV7_FIRST = dataclasses.replace(RWKV7, value_residual=False)
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
    "mamba2": model((Mamba2Config(head_dim=8, state=6, groups=2), None)),
    "mamba3": model((Mamba3Config(head_dim=8, state=6, groups=2), None)),
    "moe": model(
        (ATTENTION, MoEConfig(experts=3, expand=1.5, activation="gelu", gated=False, shared=2)),
        layers=3,
        prefix=(BlockConfig(mixer=ATTENTION, channel=MoEConfig(experts=4, top_k=1, weights="softmax_of_all")),),
    ),
    "jamba": model(
        (MambaConfig(state=4, norms=True), GatedMLPConfig()),
        (AttentionConfig(heads=4, kv_heads=2, positions="none"), MoEConfig(experts=4, weights="softmax_of_all")),
        tie_embeddings=False,
    ),
    "hybrid": model((MAMBA, None), (ATTENTION, MLPConfig(activation="relu_squared"))),
    "rwkv4": model((RWKV4Config(), RWKV4ChannelConfig()), norm="layernorm", embedding_norm=True, tie_embeddings=False),
    "rwkv6": model(
        (RWKV6Config(head_dim=8, mix_rank=3, decay_rank=4), RWKV6ChannelConfig()),
        norm="layernorm",
        embedding_norm=True,
        tie_embeddings=False,
    ),
    "rwkv7": model(
        (RWKV7, RWKV7ChannelConfig()),
        layers=3,
        prefix=(BlockConfig(mixer=RWKV7_FIRST, channel=RWKV7ChannelConfig()),),
        norm="layernorm",
        embedding_norm=True,
        tie_embeddings=False,
    ),
    # Of an input gate that is far from closed: else the normaliser is 1, and nothing depends on its state.
    "mlstm": model((MLSTMConfig(heads=2, input_bias=4.0), GatedMLPConfig()), tie_embeddings=False, logit_cap=30.0),
    "mlstm-sigmoid": model(  # in one head: the norm of a few small numbers without a normaliser amplifies rounding
        (MLSTMConfig(heads=1, qk_expand=2.0, gate="sigmoid", gate_cap=None, input_bias=0.0), GatedMLPConfig())
    ),
    "mlstm-block": model((MLSTMBlockConfig(heads=2, input_bias=4.0), None), norm="layernorm", norm_bias=False),
    "slstm": model(
        (SLSTMConfig(), GatedMLPConfig(expand=1.3, activation="gelu", round_to=8)), norm="layernorm", norm_bias=False
    ),
    "xlstm-hybrid": model(
        (MLSTMBlockConfig(heads=2, input_bias=4.0, round_to=12), None),
        (SLSTMConfig(heads=2, conv=0), MoEConfig(experts=3)),
        (ATTENTION, GatedMLPConfig()),
        layers=4,
        prefix=(BlockConfig(mixer=SLSTMConfig(conv=2), channel=None),),
    ),
    "rwkv7-hybrid": model((RWKV7_FIRST, RWKV7ChannelConfig(expand=3.5)), (ATTENTION, GatedMLPConfig())),
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


ALWAYS = {
    "test_token_by_token_equals_the_whole",
    "test_left_padding_changes_nothing",
    "test_a_gradient_reaches_every_parameter",
}
"""What `make test` asks of every architecture."""
WHOLLY = {"hybrid"}
"""The architecture of which `make test` asks everything, Mamba and attention; `make test-all` does so of all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the rest of the contract suite as slow."""
    for item in items:
        if not isinstance(item, pytest.Function) or item.path.name != "test_contract.py":
            continue
        if item.originalname not in ALWAYS and item.callspec.params["architecture"] not in WHOLLY:
            item.add_marker(pytest.mark.slow)
