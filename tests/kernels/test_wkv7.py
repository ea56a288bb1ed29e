"""What the shared suite does not ask of WKV-7: the ends of its range, its inverse, its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.wkv7 import tpu, wkv7
from phyla.kernels.wkv7.xla import CHUNK
from tests.kernels.chip import temporaries
from tests.kernels.ops.wkv7 import H, K, V, draw

B, T = 2, 3 * CHUNK + 5


def outputs_and_gradients(implementation, arguments):
    """And the sum of squares that they are the gradients of."""

    def loss(arguments):
        y, state = wkv7(**arguments, implementation=implementation)
        return jnp.sum(y**2) + jnp.sum(state**2), (y, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)


def worst(arguments):
    """The largest relative error of the fast implementation in float32, over outputs and gradients."""
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, outputs_and_gradients("reference", arguments))
    found = outputs_and_gradients("xla", {name: jnp.asarray(x, jnp.float32) for name, x in arguments.items()})
    errors = jax.tree.map(
        lambda x, w: np.linalg.norm(np.asarray(x, float) - w) / (np.linalg.norm(w) + 1e-300), found, wanted
    )
    return np.max(jax.tree.leaves(errors))  # NaN if one is


@pytest.mark.parametrize(("log_w", "tolerance"), [(-2.0, 2e-5), (-0.607, 5e-6), (0.0, 5e-6)])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_at_the_ends_of_the_range(log_w, tolerance, size):
    """Where little is left of the state, the gradient of its decay is the small difference of large sums."""
    arguments = draw(np.random.default_rng(0), B, T, wide=False)
    arguments["log_w"] = np.full_like(arguments["log_w"], log_w)
    arguments |= {name: size * arguments[name] for name in "rkv"}
    assert worst(arguments) < tolerance


def test_a_key_written_again_and_again():
    """The inverse has entries of 1 and powers of its matrix of thousands: summing those would lose four digits."""
    arguments = draw(np.random.default_rng(0), B, T, wide=False)
    arguments["a"] = np.broadcast_to(arguments["a"][:, :1], arguments["a"].shape)
    arguments["b"] = -arguments["a"]
    arguments["log_w"] = np.full_like(arguments["log_w"], -1e-3)
    assert worst(arguments) < 2e-6


def test_bfloat16_in_and_out_for_one_token_and_many():
    for length in (1, T):
        arguments = draw(np.random.default_rng(0), B, length, wide=False)
        y, state = wkv7(*(jnp.asarray(x, jnp.bfloat16) for x in arguments.values()))
        assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_the_backward_pass_keeps_the_inputs_and_one_state_a_chunk():
    arguments = {name: jnp.asarray(x, jnp.bfloat16) for name, x in draw(np.random.default_rng(0), B, T, False).items()}
    _, pull = jax.vjp(
        lambda r, log_w, k, v, a, b: wkv7(r, log_w, k, v, a, b, implementation="xla")[0], *arguments.values()
    )
    kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape") and leaf.size > 1]
    inputs = B * T * H * (5 * K + V) * 2
    states = B * -(-T // CHUNK) * H * V * K * 4
    assert sum(leaf.nbytes for leaf in kept) <= inputs + states


def test_a_document_that_overflows_leaves_the_next_one_alone():
    """Also where the next one begins within a chunk."""
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in draw(np.random.default_rng(0), B, T, False).items()}
    begin = 2 * CHUNK + 3
    loud = arguments | {"v": arguments["v"].at[:, :begin].mul(1e38), "k": arguments["k"].at[:, :begin].mul(1e3)}
    segment_ids = jnp.broadcast_to(jnp.arange(T) >= begin, (B, T)).astype(jnp.int32)
    quiet_y, quiet_state = wkv7(**arguments, segment_ids=segment_ids, implementation="xla")
    loud_y, loud_state = wkv7(**loud, segment_ids=segment_ids, implementation="xla")
    assert not np.isfinite(loud_y[:, :begin]).all()
    np.testing.assert_array_equal(loud_y[:, begin:], quiet_y[:, begin:])
    np.testing.assert_array_equal(loud_state, quiet_state)


def test_memory_of_a_training_step_with_the_kernel():
    """Beside arguments and gradients: the states at the starts of chunks, the output, and its gradient."""
    T, heads, size = 2**18, 2, 64  # so many tokens that nothing stays on the chip
    x = jax.ShapeDtypeStruct((1, T, heads * size), jnp.bfloat16)
    log_w = jax.ShapeDtypeStruct(x.shape, jnp.float32)

    def loss(*arguments):
        y, _ = wkv7(*(each.reshape(1, T, heads, size) for each in arguments))
        return jnp.sum(y.reshape(x.shape).astype(jnp.float32) ** 2)

    used = temporaries(jax.grad(loss, argnums=tuple(range(6))), x, log_w, x, x, x, x)
    states = heads * size * size * 4 / tpu.BLOCKS[2].chunk
    assert used / T < 1.01 * (states + 2 * 2 * heads * size)
