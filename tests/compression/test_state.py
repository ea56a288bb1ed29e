"""The recipe state-int8: what it makes smaller and by how much, in every family, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phyla import configs
from phyla.compression.compress import abstract, compress
from phyla.compression.recipes import parse
from phyla.compression.state import is_held, mixers
from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6ChannelConfig, RWKV6Config
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.training.speed import state_bytes

W, L, S, V = 32, 4, 100, 61
CURSOR = 8
"""Bytes: a segment and a position."""


def of(family: str) -> ModelConfig:
    return dataclasses.replace(configs.experiment(family).model, width=W, vocab_size=V)


def made_of(mixer, channel=None, **fields) -> ModelConfig:
    pattern = (BlockConfig(mixer=mixer, channel=channel),)
    return ModelConfig(width=W, layers=L, vocab_size=V, pattern=pattern, **fields)


def cache(number: float, scale: int = 0) -> float:
    """Of 4 heads of 32; a slot also knows its token and where its document began, the cache its length."""
    return 2 * S * 4 * (32 * number + scale) + 8 * S + 4 + CURSOR


def scan(number: float, scale: int = 0, inner: int = 2 * W) -> float:
    return 4 * 3 * inner + inner * (16 * number + scale) + CURSOR


# Of a layer, bytes before and after: numbers of 4 bytes or 1, and scales of 4.
LAYERS = {
    "transformer": (of("transformer"), L * cache(4), L * cache(1, 4)),
    "mamba": (of("mamba"), L * scan(4), L * scan(1, 4)),
    "jamba": (of("jamba"), 3 * scan(4) + cache(4), 3 * scan(1, 4) + cache(1, 4)),
    "rwkv": (
        of("rwkv"),
        L * (2 * (4 * W + CURSOR) + 4 * 32 * W),
        L * (2 * (4 * W + CURSOR) + 32 * W + 4 * W),
    ),
    "xlstm": (  # keys of 4 dimensions, values of 8
        of("xlstm"),
        L * (4 * (4 * 4 * 8 + 4 * 4 + 4) + CURSOR),
        L * (4 * 4 * 8 + 4 * 4 * 4 + 4 * (4 * 4 + 4) + CURSOR),
    ),
    "mamba2": (
        made_of(Mamba2Config(head_dim=16, state=8)),
        L * (4 * 3 * (2 * W + 16) + 4 * 4 * 16 * 8 + CURSOR),
        L * (4 * 3 * (2 * W + 16) + 4 * 16 * (8 + 4) + CURSOR),
    ),
    "rwkv4": (
        made_of(RWKV4Config(), RWKV4ChannelConfig()),
        L * (5 * 4 * W + 2 * CURSOR),
        L * (3 * 4 * W + 2 * (W + 4) + 2 * CURSOR),
    ),
    "rwkv6": (
        made_of(RWKV6Config(head_dim=8), RWKV6ChannelConfig()),
        L * (2 * 4 * W + 4 * W * 8 + 2 * CURSOR),
        L * (2 * 4 * W + W * (8 + 4) + 2 * CURSOR),
    ),
    "slstm": (
        made_of(SLSTMConfig()),
        L * (7 * 4 * W + CURSOR),
        L * (4 * 4 * W + 3 * (W + 4 * 4) + CURSOR),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_is_as_small_as_its_numbers_say(name):
    config, before, after = LAYERS[name]
    assert state_bytes(sizes.abstract(config), S) == before + CURSOR
    model = abstract(config, parse("state-int8"))
    assert is_held(model)
    assert state_bytes(model, S) == after + CURSOR
    state = jax.eval_shape(lambda: model.initial_state(2, S))
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(state))


def test_it_is_chained_with_recipes_of_weights():
    model = LanguageModel(of("mamba"), nnx.Rngs(0))
    steps = compress(model, parse("int8+state-int8"))
    assert not is_held(model)
    assert not is_held(steps[0].model)
    assert is_held(steps[1].model)
    assert steps[1].changed == ("periods.blocks.0.mixer.scan",)
    assert abstract(of("mamba"), parse("state-int8+nf4")).periods.blocks[0].mixer.held == ("scan",)


def test_of_some_parts_alone():
    model = abstract(of("jamba"), parse(r"state-int8@mixer\.[kv]$"))
    assert [mixer.held for _, mixer in mixers(model)] == [(), (), ("k", "v"), ()]


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        ("state-int8+state-int8", "periods.blocks.0.mixer.scan has 8 bits already"),
        ("state-int8@mixer.scam", r"in no path of a state; nearest: periods\.blocks\.0\.mixer\.scan"),
        ("state-int8+prune-channels-25%", "state is floats: put it before state-int8"),
        ("state-int4", "nearest: state-int8"),
    ],
)
def test_what_is_refused(recipes, said):
    with pytest.raises(UserError, match=said):
        abstract(of("mamba"), parse(recipes))


def test_a_model_that_keeps_no_state():
    with pytest.raises(UserError, match="sees both sides"):
        abstract(made_of(AttentionConfig(causal=False)), parse("state-int8"))
