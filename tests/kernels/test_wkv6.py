"""WKV-6: what is particular to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.wkv6 import wkv6
from phyla.kernels.wkv6.xla import CHUNK

B, T, H, K, V = 2, 3 * CHUNK + 5, 2, 4, 3


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    r, w, k = rng.normal(size=(3, B, T, H, K))
    return r, -np.exp(w - 1), k, rng.normal(size=(B, T, H, V)), rng.normal(size=(H, K)), rng.normal(size=(B, H, K, V))


def outputs_and_gradients(implementation, arguments, segment_ids=None):
    def call(*arguments):
        *arguments, state = arguments
        return wkv6(*arguments, initial_state=state, segment_ids=segment_ids, implementation=implementation)

    outputs, vjp = jax.vjp(call, *arguments)
    return outputs, vjp(jax.tree.map(jnp.cos, outputs))


def compare(arguments, segment_ids=None):
    with jax.enable_x64(True):
        exact = outputs_and_gradients("reference", [jnp.asarray(x) for x in arguments], segment_ids)
        exact = jax.tree.map(np.asarray, exact)
    found = outputs_and_gradients("xla", [jnp.asarray(x, jnp.float32) for x in arguments], segment_ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) < 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("starts", [(), (1, 20, CHUNK, 2 * CHUNK - 1, 2 * CHUNK + 7)])
def test_several_chunks(starts):
    segment_ids = np.zeros((B, T), np.int32)
    for start in starts:
        segment_ids[1, start:] += 1
    r, w, k, v, u, state = inputs()
    compare((r, w / 30, k, v, u, state), jnp.asarray(segment_ids))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("loud", [slice(40, None), slice(40)])
def test_an_overflow_in_one_document_leaves_the_other_alone(implementation, loud):
    r, w, k, v, u, state = (jnp.asarray(x, jnp.float32) for x in inputs())
    segment_ids = jnp.zeros((B, T), jnp.int32).at[:, loud].set(1)
    before, _ = wkv6(r, w, k, v, u, initial_state=state, segment_ids=segment_ids, implementation=implementation)
    r, k, v = (x.at[:, loud].set(3e38) for x in (r, k, v))
    after, _ = wkv6(r, w, k, v, u, initial_state=state, segment_ids=segment_ids, implementation=implementation)
    assert not np.isfinite(after).all()
    quiet = np.asarray(segment_ids == 0)
    np.testing.assert_array_equal(np.asarray(before)[quiet], np.asarray(after)[quiet])


def test_a_decay_beyond_all_bounds_spoils_no_digit_of_the_others():
    """Differences of cumulative sums would leave nothing of what follows such a token."""
    r, w, k, v, u, state = inputs()
    w = w / 100
    w[:, 3::17] = -1e7
    compare((r, w, k, v, u, state))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_finite_at_the_edges_of_the_range(implementation):
    r, _, k, v, u, state = (jnp.asarray(x, jnp.float32) for x in inputs())
    w = jnp.tile(jnp.asarray([0.0, -1e-38, -1e3, -1e30]), (B, T, H, 1))
    for value in jax.tree.leaves(outputs_and_gradients(implementation, (r, w, k, v, u, state))):
        assert np.isfinite(value).all()


def test_xla_refuses_float64():
    *arguments, _ = inputs()
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"'xla' computes in float32.*use 'reference'"):
        wkv6(*map(jnp.asarray, arguments), implementation="xla")
