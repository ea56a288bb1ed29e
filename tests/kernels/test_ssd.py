"""State-space duality: what is particular to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.ssd import ssd, tpu
from phyla.kernels.ssd.xla import CHUNK
from tests.kernels.chip import temporaries

B, T, H, P, G, N = 2, 3 * CHUNK + 7, 4, 3, 2, 5


def problem(rates=(B, T, H)):
    """Arguments and a state, in float64; with a decay rate for each token, or for each head only."""
    rng = np.random.default_rng(0)
    arguments = {
        "x": rng.normal(size=(B, T, H, P)),
        "dt": 10 ** rng.uniform(-2, 0, (B, T, H)),
        "A": -(10 ** rng.uniform(-2, 1, rates)),
        "B": rng.normal(size=(B, T, G, N)),
        "C": rng.normal(size=(B, T, G, N)),
        "D": rng.normal(size=H),
    }
    return arguments, rng.normal(size=(B, H, P, N))


def outputs_and_gradients(arguments, state, segment_ids, implementation, dtype):
    """Weighted alike whatever the implementation."""
    rng = np.random.default_rng(1)
    dy, dh = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, H, P), (B, H, P, N)))
    arguments, state = jax.tree.map(lambda v: jnp.asarray(v, dtype), (arguments, state))

    def call(arguments, state):
        return ssd(**arguments, initial_state=state, segment_ids=segment_ids, implementation=implementation)

    @jax.jit
    def run(arguments, state):
        outputs, vjp = jax.vjp(call, arguments, state)
        return outputs, vjp((dy, dh))

    return jax.tree.map(np.asarray, run(arguments, state))


def close_to_the_reference(arguments, state, segment_ids, tolerance=2e-6):
    found = outputs_and_gradients(arguments, state, segment_ids, "xla", jnp.float32)
    with jax.enable_x64(True):
        wanted = outputs_and_gradients(arguments, state, segment_ids, "reference", jnp.float64)
    for path, w in jax.tree.leaves_with_path(wanted):
        f = dict(jax.tree.leaves_with_path(found))[path]
        assert np.linalg.norm(f - w) <= tolerance * np.linalg.norm(w), jax.tree_util.keystr(path)


@pytest.mark.parametrize("rates", [(H,), (B, T, H)], ids=["a head", "a head and token"])
@pytest.mark.parametrize("segments", [False, True])
def test_many_chunks(rates, segments):
    segment_ids = None
    if segments:  # inside chunks, at their edges, and a document of several chunks
        starts = [[CHUNK - 1, CHUNK, CHUNK + 3, 3 * CHUNK], [5, 2 * CHUNK + 1]]
        segment_ids = np.zeros((B, T), np.int32)
        for row, at in zip(segment_ids, starts, strict=True):
            row[at] = 1
        segment_ids = np.cumsum(segment_ids, axis=1)
    close_to_the_reference(*problem(rates), segment_ids)


def test_small_decays_are_exact_after_large_ones():
    """A difference of plain sums over time would have lost them."""
    arguments, state = problem()
    arguments["dt"][:, 10:CHUNK:3] *= 1e4
    close_to_the_reference(arguments, state, None)


def test_nothing_of_another_document_is_seen_even_of_a_state_that_overflowed():
    """Which passes from the first chunk to the second, where the document in the middle begins."""
    arguments, state = problem()
    segment_ids = np.asarray([[1] * (CHUNK + 5) + [2] * CHUNK + [3] * (T - 2 * CHUNK - 5)] * B)
    here = segment_ids[0] == 2
    loud = arguments | {"x": np.where(here[:, None, None], arguments["x"], 3e38), "B": 10 * arguments["B"]}
    quiet = arguments | {"B": 10 * arguments["B"]}
    quiet_y, loud_y = (
        outputs_and_gradients(given, state, segment_ids, "xla", jnp.float32)[0][0] for given in (quiet, loud)
    )
    np.testing.assert_array_equal(quiet_y[:, here], loud_y[:, here])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_finite_at_the_edges_of_the_range(implementation):
    """dt A from 0 to beyond the largest float32."""
    x, B_, C = jnp.ones((1, 2 * CHUNK, 4, 2)), jnp.ones((1, 2 * CHUNK, 1, 3)), jnp.ones((1, 2 * CHUNK, 1, 3))
    for dt, rate in [(0.0, -1e30), (1e-38, -1.0), (1.0, -1e30), (1e12, 0.0), (1e30, -1e30), (1e12, -1e-30)]:
        dt, A = jnp.full(x.shape[:3], dt), jnp.full((4,), rate)
        outputs, vjp = jax.vjp(lambda *a: ssd(*a, implementation=implementation), x * 1e-9, dt, A, B_, C, jnp.ones(4))
        for value in jax.tree.leaves((outputs, vjp(jax.tree.map(lambda y: y * 0 + 1e-9, outputs)))):
            assert np.all(np.isfinite(value))


def test_the_backward_pass_keeps_the_inputs_and_the_states_between_chunks():
    """And no [T, CHUNK] matrix a head."""
    arguments, _ = problem((H,))
    arguments = {key: jnp.asarray(v, jnp.float32) for key, v in arguments.items()}
    _, vjp = jax.vjp(lambda a: ssd(**a, implementation="xla"), arguments)
    kept = sum(leaf.size for leaf in jax.tree.leaves(vjp))
    inputs, states = sum(v.size for v in arguments.values()), B * -(-T // CHUNK) * H * P * N
    assert kept <= inputs + states + 4 * B * T * H  # and dt A


def test_xla_refuses_float64():
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"'xla' computes in float32.*use 'reference'"):
        ssd(*(jnp.asarray(v) for v in problem()[0].values()), implementation="xla")


def test_groups_must_divide_heads():
    arguments = {key: jnp.asarray(v, jnp.float32) for key, v in problem()[0].items()}
    for key in "BC":
        arguments[key] = jnp.concatenate([arguments[key], arguments[key][:, :, :1]], axis=2)
    with pytest.raises(ValueError, match="3 groups of B do not divide 4 heads"):
        ssd(*arguments.values())


def test_memory_of_a_training_step_with_the_kernel():
    """Beside arguments and gradients: the states before chunks, rates and decays, dB and dC, the output and its own."""
    tokens, heads, size, states = 2**18, 8, 64, 128  # so many tokens that nothing stays on the chip
    x = jax.ShapeDtypeStruct((1, tokens, heads * size), jnp.bfloat16)
    dt, A = jax.ShapeDtypeStruct((1, tokens, heads), jnp.float32), jax.ShapeDtypeStruct((heads,), jnp.float32)
    B = jax.ShapeDtypeStruct((1, tokens, states), jnp.bfloat16)

    def loss(x, dt, A, B, C, D):
        y, _ = ssd(x.reshape(1, tokens, heads, size), dt, A, B[:, :, None], C[:, :, None], D)
        return jnp.sum(y.reshape(x.shape).astype(jnp.float32) ** 2)

    used = temporaries(jax.grad(loss, argnums=tuple(range(6))), x, dt, A, B, B, A)
    assert used / tokens < 2 * heads * size * states / tpu.CHUNK + 2 * 8 * heads + 8 * states + 2 * 2 * heads * size
