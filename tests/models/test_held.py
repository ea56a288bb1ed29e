"""States of 8 bits: what a code stands for, and that a model goes on from it as from the numbers that numpy rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from phyla.models.config import ModelConfig
from phyla.models.held import Held, alike, floats, hold
from phyla.models.language_model import LanguageModel

T, CALL = 9, 3
RECURRENT = ("mamba", "mamba2", "mamba3", "rwkv4", "rwkv6", "rwkv7", "mlstm", "mlstm-sigmoid", "mlstm-block", "slstm")
CACHED = ("attention", "attention-alibi-window")
MIXED = ("jamba", "xlstm-hybrid")
QUICK = ("attention", "mamba", "rwkv4", "mlstm")


def named(*names: str):
    """Of the architectures of conftest.py; `make test` has the quick ones."""
    slow = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("architecture", slow, indirect=True)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (2, 3, 5), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)),
    st.sampled_from([(-1,), (-2,), (-2, -1)]),
)
def test_a_code_errs_by_half_a_step(x, axes):
    held = hold(jnp.asarray(x), axes)
    assert (held.codes.dtype, held.codes.shape, held.scale.dtype) == (jnp.int8, x.shape, jnp.float32)
    assert held.scale.size == x.size // np.prod([x.shape[axis] for axis in axes])
    largest = np.abs(x).max(axis=axes, keepdims=True)
    error = np.abs(np.asarray(floats(held), np.float64) - x)
    assert (error <= largest / 127 * (0.5 + 1e-4) + 1e-28).all()
    assert np.abs(np.asarray(held.codes)).max() <= 127
    again = floats(alike(floats(held), held))
    np.testing.assert_allclose(again, floats(held), rtol=1e-6, atol=1e-30)


def of(config: ModelConfig, *, held: bool) -> LanguageModel:
    """With parameters that no initialisation gives, so that everything matters."""
    model = nnx.clone(_perturbed(config))
    for block in (*model.prefix, *model.periods.blocks):
        block.mixer.held = tuple(block.mixer.memory) if held else ()
    return model


@functools.cache
def _perturbed(config: ModelConfig) -> LanguageModel:
    def params() -> nnx.State:
        leaves, tree = jax.tree.flatten(nnx.state(LanguageModel(config, nnx.Rngs(0))))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return jax.tree.unflatten(
            tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )

    return nnx.merge(nnx.graphdef(jax.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))), jax.jit(params)())


@jax.jit
def call(model: LanguageModel, tokens: jax.Array, state, segment_ids: jax.Array):
    hidden, state = model(tokens, state, segment_ids)
    return model.logits(hidden), state


def rows(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """A document; the same after padding; the same after another document. And their segments."""
    assert config.vocab_size is not None
    text = np.asarray(jax.random.randint(jax.random.key(2), (T,), 0, config.vocab_size))
    other = (text[::-1] + 1) % config.vocab_size
    shifted, before = text[:-CALL], other[:CALL]
    tokens = np.stack([text, np.concatenate([0 * before, shifted]), np.concatenate([before, shifted])])
    segments = np.repeat([[1, 1, 1], [0, 1, 1], [1, 2, 2]], CALL, axis=1)
    return tokens, segments


def in_calls(model: LanguageModel, tokens, segments, between=lambda state: state, length: int = CALL):
    """The logits [B, T, V] and the last state."""
    state, parts = model.initial_state(len(tokens), T), []
    for at in range(0, T, length):
        out, state = call(model, tokens[:, at : at + length], state, segments[:, at : at + length])
        parts.append(out)
        state = between(state)
    return np.concatenate(parts, axis=1), state


@functools.cache
def carried(config: ModelConfig):
    return in_calls(of(config, held=True), *rows(config))


@named(*RECURRENT, *CACHED, *MIXED)
def test_padding_and_other_documents_do_not_leak(architecture):
    logits, state = carried(architecture)
    for other in (1, 2):
        np.testing.assert_allclose(logits[other, CALL:], logits[0, :-CALL], rtol=0, atol=2e-5)
    assert any(isinstance(node, Held) for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Held)))


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    step = np.abs(x).max(axis=axis, keepdims=True) / 127
    return np.rint(x / np.where(step > 0, step, 1)) * step


def rounded_by_numpy(model: LanguageModel, state):
    """The state with every memory rounded to 255 levels, by itself; averages where it divides by a normaliser."""

    def of_block(block, state):
        mixer, channel = state

        def one(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if name not in block.mixer.memory:
                return leaf
            if name in ("wkv.1", "cell.1"):
                return leaf  # divided by itself it is 1
            x, divisor = np.asarray(leaf, np.float64), 1.0
            if name in ("wkv.0", "cell.0"):
                weight = mixer.wkv[1] if name == "wkv.0" else mixer.cell[1]
                divisor = np.where(weight > 0, np.asarray(weight, np.float64), 1)
            return jnp.asarray(rounded(x / divisor, *block.mixer.memory[name]) * divisor, jnp.float32)

        return jax.tree_util.tree_map_with_path(one, mixer), channel

    return state._replace(
        prefix=tuple(map(of_block, model.prefix, state.prefix)),
        blocks=tuple(map(of_block, model.periods.blocks, state.blocks)),
    )


@named(*RECURRENT)
def test_a_recurrent_state_is_what_numpy_rounds_after_every_call(architecture):
    model = of(architecture, held=False)
    tokens, segments = rows(architecture)
    expected, _ = in_calls(model, tokens, segments, lambda state: rounded_by_numpy(model, state))
    exact, _ = in_calls(model, tokens, segments)
    found, _ = carried(architecture)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(found[0, :CALL], exact[0, :CALL])
    error = np.abs(found - exact).max()
    assert 1e-4 < error < 0.03 * np.abs(exact).max()  # so the comparison above does see the rounding


@named(*CACHED)
def test_a_cache_is_the_same_in_chunks_and_at_once(architecture):
    tokens, segments = rows(architecture)
    exact, _ = in_calls(of(architecture, held=False), tokens, segments)
    chunks, state = carried(architecture)
    whole, at_once = in_calls(of(architecture, held=True), tokens, segments, length=T)
    np.testing.assert_allclose(chunks, whole, rtol=0, atol=2e-5)
    error = np.abs(chunks - exact).max()
    assert 1e-4 < error < 0.03 * np.abs(exact).max()
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(at_once), strict=True):
        assert one.dtype == other.dtype
        if one.dtype == jnp.int8:
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
            assert (np.asarray(one) == np.asarray(other)).mean() > 0.99
