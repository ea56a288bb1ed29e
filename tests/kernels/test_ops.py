"""The contract of every op: each implementation against float64, and every way of calling it.

The chain of trust: a numpy function runs one document in float64 or complex128 -> the reference implementation in
float64 has its outputs and, by complex steps, its gradients -> every implementation in float32 or bfloat16.

Kernels for other chips are interpreted here, which also finds races, reads of uninitialised memory (they are NaN) and
reads out of bounds, and is slow: the quick set has some of their cases of numbers and packing, and of the ways of
calling decoding alone (and one kernel in all). Races on TPUs are looked for in the tests of numbers, float32 and
bfloat16: the others call the same kernels, up to three times faster without.
"""

import contextlib
import dataclasses
import functools
import itertools
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from phyla.kernels import tpu
from phyla.kernels.dispatch import BACKENDS
from tests.kernels.ops import OPS, Op

every_op = pytest.mark.parametrize("name", OPS)
PAIRS = [(name, implementation) for name, op in OPS.items() for implementation in ("reference", *op.fast)]
COMPILED = [pair for pair in PAIRS if pair[1] not in BACKENDS]
INTERPRETED = [pair for pair in PAIRS if pair[1] in BACKENDS]


QUICK_ANYWAY = ("mlstm", "tpu")
"""The kernel that the quick set calls in every way: they are wrapped alike (`phyla.kernels.partition`)."""


def _slow_on(backends, pairs):
    slow = [pair[1] in backends and pair != QUICK_ANYWAY for pair in pairs]
    marked = [pytest.param(*pair, marks=pytest.mark.slow if s else ()) for pair, s in zip(pairs, slow, strict=True)]
    return pytest.mark.parametrize(("name", "implementation"), marked)


every_implementation_quickly = pytest.mark.parametrize(("name", "implementation"), PAIRS)
every_implementation = _slow_on(BACKENDS, PAIRS)
every_compiled_implementation = pytest.mark.parametrize(("name", "implementation"), COMPILED)
# The interpreter of GPU kernels calls back for every access: two calls of each op are in the quick set.
every_interpreted_implementation = _slow_on({"gpu"}, INTERPRETED)
every_fast_implementation = _slow_on(BACKENDS, [pair for pair in PAIRS if pair[1] != "reference"])


class Case(NamedTuple):
    """One call of an op. `starts` are the first tokens of new segments, row by row."""

    B: int
    T: int
    starts: tuple[tuple[int, ...], ...] = ()
    state: bool = True
    wide: bool = False


CASES = {
    "one token": Case(2, 1, ((), ())),
    "less than a chunk": Case(2, 5, state=False),
    "one chunk": Case(1, 16),
    "no state": Case(2, 37, ((7, 16, 17, 32), (36,)), state=False),
    "segments": Case(2, 32, ((5, 16, 31), ())),
    "every token": Case(1, 18, (tuple(range(1, 18)),)),
    "wide": Case(2, 40, wide=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
QUICK = {"tpu": ("one token", "no state", "segments", "wide"), "gpu": ("segments",)}
"""The cases in which kernels are interpreted in the quick set."""


@pytest.fixture(autouse=True)
def interpreter():
    """A failure in an interpreted kernel, such as a race, leaves the interpreter's memory behind."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def unwatched(monkeypatch):
    """Without the search for races on TPUs."""
    monkeypatch.setattr(tpu, "INTERPRETER", dataclasses.replace(tpu.INTERPRETER, detect_races=False))


without_races = pytest.mark.usefixtures("unwatched")


def tolerance(op: Op, implementation: str, *, wide: bool = False) -> float:
    """Of float32: norm of the error over the norm."""
    if implementation in BACKENDS:
        return 1e-4
    return op.wide_tolerance if wide else op.tolerance


def problem(op: Op, case: Case):
    """Arguments, state, segment ids and cotangents, in float64."""
    rng = np.random.default_rng(0)
    arguments = op.draw(rng, case.B, case.T, case.wide)
    state = op.draw_state(rng, case.B)
    d_state = jax.tree.map(lambda s: rng.normal(size=s.shape), state)
    segment_ids = None
    if case.starts:
        segment_ids = np.zeros((case.B, case.T), np.int32)
        for row, starts in zip(segment_ids, case.starts, strict=True):
            row[list(starts)] = 1
        segment_ids = np.cumsum(segment_ids, 1, dtype=np.int32) % 2  # ids return, as they may
    cotangents = rng.normal(size=(case.B, case.T, *op.output_shape)), d_state
    return arguments, state if case.state else None, segment_ids, cotangents


def by_documents(op: Op, arguments, state, segment_ids):
    """Run every document of every row on its own through the numpy function."""
    B, T = next(arguments[key].shape[:2] for key in arguments if key in op.by_token)
    empty = jax.tree.map(np.zeros_like, op.draw_state(np.random.default_rng(0), 1))
    ys, states = [], []
    for b in range(B):
        h = jax.tree.map(lambda s: s[0], empty) if state is None else jax.tree.map(lambda s, b=b: s[b], state)
        edges = [0, T] if segment_ids is None else [0, *(np.flatnonzero(np.diff(segment_ids[b])) + 1), T]
        y = []
        for start, end in itertools.pairwise(edges):
            one = {key: v[b, start:end] if key in op.by_token else v for key, v in arguments.items()}
            out, h = op.document(h if start == 0 else jax.tree.map(lambda s: s[0], empty), **one)
            y.append(out)
        ys.append(np.concatenate(y))
        states.append(h)
    return np.stack(ys), jax.tree.map(lambda *s: np.stack(s), *states)


@functools.partial(jax.jit, static_argnums=0, static_argnames="implementation")
def run(op: Op, arguments, state, segment_ids, cotangents, implementation):
    """((y, final state), (gradients of the arguments, gradient of the initial state))."""

    def call(arguments, state):
        return op.call(**arguments, initial_state=state, segment_ids=segment_ids, implementation=implementation)

    outputs, vjp = jax.vjp(call, arguments, state)
    return outputs, vjp(jax.tree.map(lambda g, y: g.astype(y.dtype), cotangents, outputs))


@functools.cache
def expected(name: str, case: Case):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(OPS[name], *problem(OPS[name], case), implementation="reference"))


def error(actual, wanted):
    """Norm of the difference over the norm of what is wanted, the largest over a tree."""
    flat = zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True)
    return max(np.linalg.norm(np.asarray(a, float) - w) / (np.linalg.norm(w) + 1e-30) for a, w in flat)


def inner(a, b):
    """The inner product of two trees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.sum(x * y), a, b)))


@every_op
@every_case
def test_reference_in_float64_agrees_with_numpy(name, case):
    op = OPS[name]
    arguments, state, segment_ids, cotangents = problem(op, case)
    outputs, gradients = expected(name, case)
    assert outputs[0].dtype == np.float64
    assert error(outputs, by_documents(op, arguments, state, segment_ids)) < 1e-13
    # A complex step differentiates the numpy function along a random direction of one argument at a time.
    rng = np.random.default_rng(1)
    for key in [*arguments, *(["state"] if case.state else [])]:
        point = {**arguments, "state": state}
        gradient = gradients[1] if key == "state" else gradients[0][key]
        direction = jax.tree.map(lambda v: rng.normal(size=v.shape) * v, point[key])
        point[key] = jax.tree.map(lambda v, d: v + 1e-30j * d, point[key], direction)
        moved = by_documents(op, {k: point[k] for k in arguments}, point["state"], segment_ids)
        slope = inner(cotangents, jax.tree.map(np.imag, moved)) / 1e-30
        np.testing.assert_allclose(inner(gradient, direction), slope, rtol=1e-9, atol=1e-12, err_msg=key)


def cast(tree, dtype):
    return jax.tree.map(lambda v: jnp.asarray(v, dtype if v.dtype == float else None), tree)


def _each_case(pairs):
    for (name, implementation), title in itertools.product(pairs, CASES):
        slow = title not in QUICK.get(implementation, CASES)
        marks = pytest.mark.slow if slow else ()
        yield pytest.param(name, implementation, CASES[title], id=f"{name}-{implementation}-{title}", marks=marks)


@pytest.mark.parametrize(("name", "implementation", "case"), list(_each_case(PAIRS)))
def test_float32(name, implementation, case, request):
    op = OPS[name]
    if case.wide:  # about numbers only
        request.getfixturevalue("unwatched")
    outputs, gradients = run(op, *cast(problem(op, case), jnp.float32), implementation=implementation)
    assert {v.dtype for v in jax.tree.leaves((outputs, gradients))} == {jnp.dtype(jnp.float32)}
    assert error((outputs, gradients), expected(name, case)) < tolerance(op, implementation, wide=case.wide)


@every_implementation_quickly
def test_bfloat16(name, implementation):
    op, case = OPS[name], CASES["segments"]
    arguments, state, segment_ids, cotangents = problem(op, case)
    arguments, cotangents = cast((arguments, cotangents), jnp.bfloat16)
    state = cast(state, jnp.float32)
    (y, final), (gradients, d_state) = run(op, arguments, state, segment_ids, cotangents, implementation=implementation)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: np.asarray(v, float), (arguments, state, cotangents))
        wanted = run(op, *exact[:2], segment_ids, exact[2], implementation="reference")
        (wanted_y, wanted_final), (wanted_gradients, wanted_d_state) = jax.tree.map(np.asarray, wanted)
    assert y.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves((final, d_state))} == {jnp.dtype(jnp.float32)}
    assert all(v.dtype == jnp.bfloat16 for v in gradients.values())
    inputs, inside = 2.0**-8, op.tolerance  # that of one rounding to bfloat16; float32 inside, whatever comes in
    if implementation in BACKENDS:  # whose matrix units take bfloat16
        inputs = inside = 2e-2
    assert error((y, gradients), (wanted_y, wanted_gradients)) < inputs
    assert error((final, d_state), (wanted_final, wanted_d_state)) < inside


def _each_split():
    for name, implementation in PAIRS:
        if implementation != "reference":
            marks = pytest.mark.slow if implementation in BACKENDS and (name, implementation) != QUICK_ANYWAY else ()
            yield pytest.param(name, implementation, 20, marks=marks)
            yield pytest.param(name, implementation, 1, marks=marks)


@without_races
@pytest.mark.parametrize(("name", "implementation", "split"), list(_each_split()))
def test_split_anywhere(name, implementation, split):
    """Two calls that hand the state over are one call, in gradients too."""
    op, case = OPS[name], Case(2, 33)
    arguments, state, _, cotangents = cast(problem(op, case), jnp.float32)

    def parts(arguments, state):
        ys = []
        for part in (slice(0, split), slice(split, None)):
            here = {key: v[:, part] if key in op.by_token else v for key, v in arguments.items()}
            y, state = op.call(**here, initial_state=state, implementation=implementation)
            ys.append(y)
        return jnp.concatenate(ys, 1), state

    @jax.jit
    def outputs_and_gradients(arguments, state):
        outputs, vjp = jax.vjp(parts, arguments, state)
        return outputs, vjp(cotangents)

    assert error(outputs_and_gradients(arguments, state), expected(name, case)) < tolerance(op, implementation)


@without_races
@every_implementation_quickly
def test_token_by_token_under_scan(name, implementation):
    """Decoding: a scan over calls with T = 1 that carries the state."""
    op, case = OPS[name], Case(2, 33)
    arguments, state, _, _ = cast(problem(op, case), jnp.float32)
    tokens = {key: jnp.moveaxis(v, 1, 0)[:, :, None] for key, v in arguments.items() if key in op.by_token}

    def step(state, token):
        y, state = op.call(**arguments | token, initial_state=state, implementation=implementation)
        return state, y[:, 0]

    final, y = jax.jit(lambda state: jax.lax.scan(step, state, tokens))(state)
    assert error((jnp.moveaxis(y, 0, 1), final), expected(name, case)[0]) < tolerance(op, implementation)


packings = hypothesis.given(
    segment_ids=hypothesis.extra.numpy.arrays(np.int32, (2, 21), elements=st.integers(0, 2)), data=st.data()
)


@every_compiled_implementation
@hypothesis.settings(max_examples=30, deadline=None)
@packings
def test_packed_equals_separate(name, implementation, segment_ids, data):
    packed_equals_separate(name, implementation, segment_ids, data)


# Interpreted matrix units are NumPy's product, which warns of the overflow that this is about.
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in matmul:RuntimeWarning")


@without_races
@every_interpreted_implementation
@overflows
@hypothesis.settings(
    max_examples=3, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@packings
def test_packed_equals_separate_interpreted(name, implementation, segment_ids, data):
    packed_equals_separate(name, implementation, segment_ids, data)


@every_interpreted_implementation
@overflows
@pytest.mark.slow
@hypothesis.settings(max_examples=30, deadline=None)
@packings
def test_packed_equals_separate_interpreted_more(name, implementation, segment_ids, data):
    packed_equals_separate(name, implementation, segment_ids, data)


def packed_equals_separate(name, implementation, segment_ids, data):
    """Nothing of a document reaches another, neither forwards nor backwards."""
    op, case = OPS[name], Case(2, 21)
    arguments, state, _, (dy, dh) = problem(op, case)
    # Gradients flow from one document of the first row only, and must stay inside it.
    edges = [0, *(np.flatnonzero(np.diff(segment_ids[0])) + 1), case.T]
    first = data.draw(st.integers(0, len(edges) - 2))
    inside = np.zeros((2, case.T), bool)
    inside[0, edges[first] : edges[first + 1]] = True
    dy, dh = np.where(inside.reshape(2, -1, *(1,) * (dy.ndim - 2)), dy, 0), jax.tree.map(np.zeros_like, dh)
    given = cast((arguments, state, segment_ids, (dy, dh)), jnp.float32)
    outputs, (gradients, d_state) = run(op, *given, implementation=implementation)
    assert error(outputs, by_documents(op, arguments, state, segment_ids)) < tolerance(op, implementation)
    for key in op.by_token & set(arguments):
        assert not np.any(np.asarray(gradients[key])[~inside]), key
    if first > 0:
        assert not any(np.any(d) for d in jax.tree.leaves(d_state))
    # Nor may anything in another document, up to overflow, change a bit of this one.
    loud = jax.tree.map(np.copy, arguments)
    for key in op.loud:
        loud[key][~inside] = 3e38
    louder, _ = run(op, *cast((loud, state, segment_ids, (dy, dh)), jnp.float32), implementation=implementation)
    np.testing.assert_array_equal(np.asarray(louder[0])[inside], np.asarray(outputs[0])[inside])


@without_races
@every_implementation
def test_vmap(name, implementation):
    """Under vmap, with the weights shared and with segments of each element's own."""
    op, case = OPS[name], CASES["segments"]
    arguments, state, segment_ids, cotangents = cast(problem(op, case), jnp.float32)

    def one(by_token, state, segment_ids, cotangents):
        return run(op, arguments | by_token, state, segment_ids, cotangents, implementation=implementation)

    rows = jax.tree.map(
        lambda v: v[:, None], ({k: arguments[k] for k in arguments if k in op.by_token}, state, segment_ids, cotangents)
    )
    (y, final), (gradients, d_state) = jax.vmap(one)(*rows)
    per_row = {key: v[:, 0] if key in op.by_token else v.sum(0) for key, v in gradients.items()}
    final, d_state = jax.tree.map(lambda v: v[:, 0], (final, d_state))
    assert error(((y[:, 0], final), (per_row, d_state)), expected(name, case)) < tolerance(op, implementation)


def sharded(op, case, implementation, manual):
    """Outputs and gradients with the batch over two devices, and the compiled text."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    given = cast(problem(op, case), jnp.float32)
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = ({key: rows if key in op.by_token else everywhere for key in given[0]}, rows, rows, (rows, rows))
    call = functools.partial(run, op, implementation=implementation)
    if manual:
        call = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=(specs[3], specs[:2]))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with contextlib.nullcontext() if manual else jax.set_mesh(mesh):
        compiled = jax.jit(call, in_shardings=shardings).lower(*given).compile()
    return compiled(*jax.device_put(given, shardings)), str(compiled.as_text())


@without_races
@every_implementation
def test_shard_map(name, implementation):
    """With the types of varying values checked; the gradients of the weights are summed over the mesh."""
    outputs, _ = sharded(OPS[name], CASES["segments"], implementation, manual=True)
    assert error(outputs, expected(name, CASES["segments"])) < tolerance(OPS[name], implementation)


@without_races
@every_fast_implementation
def test_mesh_in_the_context(name, implementation):
    """Every device does its own rows, without a collective in the body of a loop, where it would run once per token."""
    outputs, text = sharded(OPS[name], CASES["segments"], implementation, manual=False)
    assert error(outputs, expected(name, CASES["segments"])) < tolerance(OPS[name], implementation)
    loops, entry = text.split("\nENTRY")
    assert (" all-reduce(" in entry) == bool(set(problem(OPS[name], CASES["segments"])[0]) - OPS[name].by_token)
    assert " all-reduce(" not in loops
    assert " all-gather(" not in text


@every_compiled_implementation
@pytest.mark.slow
def test_second_derivative(name, implementation):
    """A gradient of a gradient is right, if not fast. (Kernels can be differentiated once.)"""
    op, case = OPS[name], CASES["less than a chunk"]
    arguments, _, _, (dy, _) = problem(op, case)
    key = min(op.loud)

    def penalty(arguments, implementation):
        def loss(x):
            y, state = op.call(**arguments | {key: x}, implementation=implementation)
            return jnp.sum(jnp.sin(y) * dy.astype(y.dtype)) + sum(jnp.sum(s**2) for s in jax.tree.leaves(state))

        return jnp.sum(jax.grad(loss)(arguments[key]) ** 2)

    second = jax.jit(jax.grad(penalty), static_argnums=1)
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, second(arguments, "reference"))
    assert error(second(cast(arguments, jnp.float32), implementation), wanted) < 1e-5
