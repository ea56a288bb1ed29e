"""mLSTM over several chunks, at the gates' extremes, and beside the published stabiliser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.dispatch import Unfit
from phyla.kernels.mlstm import mlstm, tpu, tpu_chunk
from phyla.kernels.mlstm.xla import CHUNK
from phyla.training import targets
from tests.kernels.chip import temporaries
from tests.kernels.ops import OPS
from tests.kernels.ops.mlstm import H, K, V, draw, log_sigmoid
from tests.kernels.test_ops import Case, cast, error, expected, problem, run

EDGE = CHUNK - 1
LONG = {
    "two chunks": Case(1, 2 * CHUNK),
    "two and a token": Case(2, 2 * CHUNK + 1, state=False),
    "segments": Case(2, 3 * CHUNK + 9, ((EDGE, CHUNK, 2 * CHUNK + 5), (3, 2 * CHUNK, 3 * CHUNK + 1))),
    "a segment of two chunks": Case(1, 4 * CHUNK, ((CHUNK - 9, 3 * CHUNK + 2),)),
    "wide": Case(1, 3 * CHUNK, wide=True),
}


@pytest.mark.parametrize("name", ["mlstm", "mlstm_sigmoid"])
@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_several_chunks(name, case):
    op = OPS[name]
    outputs_and_gradients = run(op, *cast(problem(op, case), jnp.float32), implementation="xla")
    assert error(outputs_and_gradients, expected(name, case)) < 4e-6


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("mlstm", Case(1, 41, ((7, 8, 16, 36),))),
        pytest.param("mlstm", Case(1, 48), marks=pytest.mark.slow),
        pytest.param("mlstm_sigmoid", Case(1, 41, ((7, 8, 16, 36),)), marks=pytest.mark.slow),
        pytest.param("mlstm", Case(1, 42, ((3, 39),), wide=True), marks=pytest.mark.slow),
    ],
)
def test_the_kernel_over_several_chunks_of_two_tiles(name, case, monkeypatch):
    """The suite's sizes fill neither a chunk of the kernel's nor a tile."""
    monkeypatch.setattr(tpu, "CHUNK", dict.fromkeys(tpu.CHUNK, 16))
    monkeypatch.setattr(tpu_chunk, "TILE", 8)
    found = run(OPS[name], *cast(problem(OPS[name], case), jnp.float32), implementation="tpu")
    assert error(found, expected(name, case)) < 1e-4


@pytest.mark.slow
def test_the_kernel_as_it_is_on_the_chip():
    """Its own chunks and tiles, of heads of two sizes, and one head at a time of three."""
    rng = np.random.default_rng(0)
    for (heads, size), T in {(3, 129): 300, (2, 100): 150}.items():
        arguments = [rng.normal(size=(1, T, heads, size)) for _ in range(3)]
        arguments += [rng.uniform(-3, 3, (1, T, heads)) for _ in range(2)]
        segment_ids = jnp.arange(T)[None] // 140

        def both(implementation, given, segment_ids=segment_ids):
            call = functools.partial(mlstm, segment_ids=segment_ids, implementation=implementation)
            outputs, vjp = jax.vjp(call, *given)
            return outputs, vjp(jax.tree.map(jnp.sin, outputs))

        with jax.enable_x64(True):
            wanted = jax.tree.map(np.asarray, both("reference", arguments))
        assert error(both("tpu", cast(arguments, jnp.float32)), wanted) < 1e-4


def test_heads_that_do_not_fit_run_elsewhere():
    """Asked for by name, the kernel raises; chosen for its chip, it steps aside and says why."""
    x, gate = jax.ShapeDtypeStruct((1, 300, 1, 2048), jnp.float32), jax.ShapeDtypeStruct((1, 300, 1), jnp.float32)
    with pytest.raises(Unfit, match=r"heads of 2048 x 2048 and chunks of 256 tokens need .* of 48 MB VMEM"):
        jax.eval_shape(functools.partial(mlstm, implementation="tpu"), x, x, x, gate, gate)
    with jax.set_mesh(targets.mesh("v5e")), pytest.warns(UserWarning, match="mlstm: no tpu kernel fits, so xla runs"):
        jax.eval_shape(mlstm, x, x, x, gate, gate)


def test_memory_of_a_training_step_with_the_kernel():
    """Beside arguments and gradients: the memories at the starts of chunks, the gates' rows, and h's gradient."""
    T, heads, size = 2**18, 1, 128  # so many that they do not stay on the chip
    x = jax.ShapeDtypeStruct((1, T, heads, size), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((1, T, heads), jnp.float32)

    def loss(*arguments):
        return jnp.sum(mlstm(*arguments)[0].astype(jnp.float32) ** 2)

    used = temporaries(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), x, x, x, gate, gate)
    memories, gates = heads * (2 * size * size + 4 * size) / tpu.CHUNK[128], heads * (32 + 8 + 32)
    assert used / T < memories + gates + 2 * heads * size


@pytest.mark.parametrize("name", ["mlstm", "mlstm_sigmoid"])
@pytest.mark.parametrize("f", [-30.0, 0.0, 30.0])
@pytest.mark.parametrize("i", [-30.0, 0.0, 30.0])
def test_gates_at_their_extremes(name, i, f):
    """One value everywhere, over two chunks."""
    op, case = OPS[name], Case(1, CHUNK + 8)
    arguments, state, segment_ids, cotangents = problem(op, case)
    arguments |= {"q": np.abs(arguments["q"]), "k": np.abs(arguments["k"])}  # else h is ill-conditioned
    # Nearly, since the derivative of the maximum is not one number where i_t = m_{t-1}.
    jitter = 1e-3 * np.random.default_rng(2).normal(size=(2, *arguments["i"].shape))
    arguments |= {"i": i + jitter[0], "f": f + jitter[1]}
    given = arguments, state, segment_ids, cotangents
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, run(op, *given, implementation="reference"))
    found = run(op, *cast(given, jnp.float32), implementation="xla")
    if name == "mlstm" and f < 0 < i:  # one token alone: h = v whatever q is, and the gradient of q is rounding
        q, wanted_q = (gradients[0].pop("q") for _, gradients in (found, wanted))
        np.testing.assert_allclose(q, wanted_q, rtol=0, atol=4e-6)
    assert error(found, wanted) < 4e-6


@pytest.mark.parametrize("implementation", ["reference", "xla", pytest.param("tpu", marks=pytest.mark.slow)])
def test_results_are_finite_for_any_gates(implementation):
    rng = np.random.default_rng(0)
    arguments = draw(rng, 2, CHUNK + 8, wide=False)
    arguments |= {gate: rng.choice([-3e38, -1e3, 0.0, 1e3, 3e38], (2, CHUNK + 8, H)) for gate in "if"}
    for name in ("mlstm", "mlstm_sigmoid"):
        op = OPS[name]
        _, state, _, cotangents = problem(op, Case(2, CHUNK + 8))
        found = run(op, *cast((arguments, state, None, cotangents), jnp.float32), implementation=implementation)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            assert np.isfinite(leaf).all(), (name, path)


def published(q, k, v, i, f):
    """Beck et al., equations 19-27, stabilised as there from m = 0; [T, H, ...]."""
    C, n, m = np.zeros((H, K, V)), np.zeros((H, K)), np.zeros(H)
    h = []
    for t in range(len(q)):
        before, m = m, np.maximum(log_sigmoid(f[t]) + m, i[t])
        decay, weight = np.exp(log_sigmoid(f[t]) + before - m), np.exp(i[t] - m)
        C = decay[:, None, None] * C + weight[:, None, None] * k[t][:, :, None] * v[t][:, None]
        n = decay[:, None] * n + weight[:, None] * k[t]
        query = q[t] / np.sqrt(K)
        norm = np.maximum(np.abs((n * query).sum(-1)), np.exp(-m)) + 1e-6
        h.append((C * query[:, :, None]).sum(1) / norm[:, None])
    return np.stack(h)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_least_stabiliser_changes_h_by_less_than_epsilon(implementation):
    arguments = draw(np.random.default_rng(0), 1, 50, wide=False)
    arguments["i"] -= 10  # as xLSTM-7B begins: the published stabiliser sinks to -10
    wanted = published(**{key: value[0] for key, value in arguments.items()})
    with jax.enable_x64(True):
        exact = mlstm(**arguments, implementation="reference")[0]
    np.testing.assert_allclose(exact[0], wanted, rtol=1.01e-6, atol=0)
    h, _ = mlstm(**cast(arguments, jnp.float32), implementation=implementation)
    np.testing.assert_allclose(h[0], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_only_inputs_and_the_chunks_starts_are_kept():
    """For the backward pass: nothing of the size [L, L] a chunk, and a memory only for every chunk."""
    T, size = 4 * CHUNK, 16
    x = jnp.zeros((1, T, 1, size))
    gate = jnp.zeros((1, T, 1))
    _, vjp = jax.vjp(lambda *inputs: mlstm(*inputs, implementation="xla")[0], x, x, x, gate, gate)
    kept = sum(leaf.size for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array))
    inputs, memories = 3 * T * size, (T // CHUNK + 1) * size * (size + 1)
    assert kept < inputs + memories + 20 * T  # gates and stabilisers: a few numbers a token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "sigmoidal"}, "unknown gate 'sigmoidal'; choices: exponential, sigmoid"),
        ({"initial_state": (jnp.zeros((1, H, K, V)),)}, r"initial_state has 1 arrays, expected \(C, n, m\)"),
        ({"f": jnp.zeros((1, 3, H + 1))}, r"mlstm: f has shape \(1, 3, 3\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = cast(draw(np.random.default_rng(0), 1, 3, wide=False), jnp.float32)
    with pytest.raises(ValueError, match=message):
        functools.partial(mlstm, **arguments)(**change)
