"""WKV-4: what is particular to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.wkv4 import wkv4

B, T, D = 2, 40, 4
implementations = pytest.mark.parametrize("implementation", ["reference", "xla"])


def inputs(length=T):
    keys = jax.random.split(jax.random.key(0), 4)
    k, v = (jax.random.normal(key, (B, length, D)) for key in keys[:2])
    return k, v, -jnp.exp(jax.random.normal(keys[2], (D,))), jax.random.normal(keys[3], (D,))


def outputs_and_gradients(implementation, arguments, state):
    def call(arguments, state):
        return wkv4(*arguments, initial_state=state, implementation=implementation)

    outputs, vjp = jax.vjp(call, arguments, state)
    return outputs, vjp(jax.tree.map(jnp.ones_like, outputs))


@implementations
@pytest.mark.parametrize("length", [1, T])
def test_a_state_without_weight_is_empty_whatever_else_is_in_it(implementation, length):
    zeros = (jnp.zeros((B, D)),) * 3
    nothing = wkv4(*inputs(length), implementation=implementation)
    for state in (zeros, (jnp.full((B, D), 7.0), jnp.zeros((B, D)), jnp.full((B, D), 50.0))):
        outputs, (gradients, d_state) = outputs_and_gradients(implementation, inputs(length), state)
        jax.tree.map(np.testing.assert_array_equal, outputs, nothing)
        np.testing.assert_array_equal(outputs[0][:, 0], inputs(length)[1][:, 0])  # the average of one value
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert not any(np.any(x) for x in d_state)


@implementations
def test_finite_at_the_edges_of_the_range(implementation):
    k, v, _, _ = inputs()
    k = k * jnp.asarray([1e30, 1e3, 1.0, 0.0])
    for w in (0.0, -1e-38, -1e3, -1e30):
        for u in (-1e30, 0.0, 1e30):
            arguments = k, v, jnp.full(D, w), jnp.full(D, u)
            state = (jnp.ones((B, D)),) * 3
            for value in jax.tree.leaves(outputs_and_gradients(implementation, arguments, state)):
                assert np.isfinite(value).all()


@implementations
def test_large_keys_average_as_small_ones(implementation):
    k, v, w, u = inputs()
    y, (_, bb, pp) = wkv4(k, v, w, u, implementation=implementation)
    louder, (_, bb_louder, pp_louder) = wkv4(k + 2.0**10, v, w, u, implementation=implementation)
    np.testing.assert_allclose(louder, y, atol=1e-3)  # k itself loses digits
    np.testing.assert_allclose(bb_louder, bb, rtol=1e-3)
    np.testing.assert_allclose(pp_louder - 2.0**10, pp, atol=1e-3)


def test_xla_refuses_float64():
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"'xla' computes in float32.*use 'reference'"):
        wkv4(*(jnp.asarray(np.asarray(x, float)) for x in inputs()), implementation="xla")


def test_a_state_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"wkv4: bb has shape \(2, 5\), expected \[B=2, D=4\]"):
        wkv4(*inputs(), initial_state=(jnp.zeros((B, D)), jnp.zeros((B, D + 1)), jnp.zeros((B, D))))
