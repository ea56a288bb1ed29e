"""Kernels for GPUs lower for chips that are not here; their interpreter finds what the suite of the ops relies on."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels import gpu
from phyla.kernels import quantized_matmul as ops
from phyla.kernels.dispatch import Unfit
from phyla.kernels.mlstm import mlstm
from phyla.kernels.selective_scan import selective_scan
from phyla.kernels.slstm import slstm
from phyla.kernels.ssd import ssd
from phyla.kernels.wkv7 import wkv7
from tests.kernels.ops import OPS
from tests.kernels.test_ops import Case, cast, error, problem, run

B, T, WIDTH = 1, 8192, 5120


class Problem(NamedTuple):
    """An op at a realistic size: its arguments' shapes, in the activations' dtype (True) or in float32."""

    call: Callable
    arguments: Mapping[str, tuple[tuple[int, ...], bool]]
    kernels: int = 2  # in a forward and backward pass
    chips: tuple[str, ...] = tuple(gpu.CHIPS)

    def lower(self, chip: str, dtype) -> str:
        """The program of a forward and backward pass."""
        shapes = {k: jax.ShapeDtypeStruct(s, dtype if low else jnp.float32) for k, (s, low) in self.arguments.items()}
        ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

        def loss(arguments, segment_ids):
            results = self.call(**arguments, segment_ids=segment_ids, implementation="gpu")
            return sum(jnp.sum(v, dtype=jnp.float32) for v in jax.tree.leaves(results))

        with jax.sharding.use_abstract_mesh(gpu.lowering_mesh(chip)):
            traced = jax.jit(jax.value_and_grad(loss)).trace(shapes, ids)
            return traced.lower(lowering_platforms=("cuda",)).as_text()


PROBLEMS = {
    "selective_scan": Problem(
        selective_scan,
        {
            "x": ((B, T, WIDTH), True),
            "dt": ((B, T, WIDTH), True),
            "A": ((WIDTH, 16), False),
            "B": ((B, T, 16), True),
            "C": ((B, T, 16), True),
            "D": ((WIDTH,), False),
        },
    ),
    "ssd": Problem(
        ssd,
        {
            "x": ((B, T, 32, 64), True),
            "dt": ((B, T, 32), False),
            "A": ((32,), False),
            "B": ((B, T, 1, 128), True),
            "C": ((B, T, 1, 128), True),
            "D": ((32,), False),
        },
        chips=("h100",),
    ),
    "mlstm": Problem(
        mlstm,
        dict.fromkeys("qkv", ((B, T, 16, 128), True)) | dict.fromkeys("if", ((B, T, 16), False)),
        chips=("h100",),
    ),
    "slstm": Problem(
        slstm,
        dict.fromkeys("ifzo", ((B, T, 4, 64), True)) | {"R": ((4, 4, 64, 64), False), "bias": ((4, 4, 64), False)},
        chips=("h100",),
    ),
    "wkv7": Problem(
        wkv7, dict.fromkeys(("r", "k", "v", "a", "b"), ((B, T, 32, 64), True)) | {"log_w": ((B, T, 32, 64), False)}
    ),
}
CASES = [(name, chip) for name, problem in PROBLEMS.items() for chip in gpu.CHIPS]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "chip"), CASES)
def test_forward_and_backward_lower(name, chip, dtype):
    problem = PROBLEMS[name]
    if chip in problem.chips:
        assert problem.lower(chip, dtype).count("custom_call @mosaic_gpu") == problem.kernels
    else:
        with pytest.raises(Unfit, match="compute capability"):
            problem.lower(chip, dtype)


FORMATS = {
    "int8": ops.quantize_int8,
    "dynamic int8": functools.partial(ops.quantize_int8, dynamic=True),
    "float8": ops.quantize_float8,
    "int4": ops.quantize_int4,
    "int4 with zeros": functools.partial(ops.quantize_int4, group=32, symmetric=False),
    "nf4": ops.quantize_nf4,
}


def lower_matmul(chip, name, M, dtype):
    """Forward and backward at 4096 × 14336."""
    K, N = 4096, 14336
    w = jax.eval_shape(FORMATS[name], jax.ShapeDtypeStruct((K, N), jnp.float32))
    x, g = (jax.ShapeDtypeStruct((M, size), dtype) for size in (K, N))

    def call(x, w, g):
        y, pullback = jax.vjp(lambda x: ops.quantized_matmul(x, w, implementation="gpu"), x)
        return y, *pullback(g)

    with jax.sharding.use_abstract_mesh(gpu.lowering_mesh(chip)):
        return jax.jit(call).trace(x, w, g).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "M", "dtype"),
    [
        ("int8", 8, "float32"),
        ("dynamic int8", 512, "bfloat16"),
        ("int4 with zeros", 512, "bfloat16"),
        ("nf4", 8, "bfloat16"),
    ]
    + [
        pytest.param(name, M, dtype, marks=pytest.mark.slow)
        for name in FORMATS
        for M in (1, 512)
        for dtype in ("float32", "bfloat16")
    ],
)
def test_quantized_matmul_lowers(name, M, dtype):
    """The two products and nothing that has the size of the dense matrix."""
    program = lower_matmul("h100", name, M, dtype)
    assert program.count("custom_call @mosaic_gpu") == 2
    assert not re.search(r"tensor<4096x14336x(f32|bf16)>", program)


def test_experts_lower():
    """Rows by their own of several matrices, few and many, as a mixture's experts have them."""
    w = jax.eval_shape(jax.vmap(ops.quantize_nf4), jax.ShapeDtypeStruct((4, 256, 512), jnp.float32))
    for M in (1, 100):
        x = jax.ShapeDtypeStruct((4, M, 256), jnp.bfloat16)
        with jax.sharding.use_abstract_mesh(gpu.lowering_mesh("h100")):
            lowered = jax.jit(jax.vmap(ops.quantized_matmul)).trace(x, w).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("chip", ["a100", "b200"])
def test_quantized_matmul_is_for_hopper(chip):
    with pytest.raises(Unfit, match="compute capability"):
        lower_matmul(chip, "nf4", 8, "bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(ops.Int8):
    """A format that no kernel knows."""


def test_what_does_not_fit_says_why():
    known = ops.quantize_int8(jnp.ones((8, 8)))
    other = Other(codes=known.codes, scale=known.scale)
    with pytest.raises(Unfit, match="no kernel for Other"):
        ops.quantized_matmul(jnp.ones((1, 8)), other, implementation="gpu")
    w = ops.quantize_int4(jnp.ones((96, 8)), group=48)
    with pytest.raises(Unfit, match="96 rows in groups of 48"):
        ops.quantized_matmul(jnp.ones((1, 96)), w, implementation="gpu")

    x, A, B = jnp.ones((1, 4, 8)), -jnp.ones((8, 33)), jnp.ones((1, 4, 33))
    with pytest.raises(Unfit, match="N is 33"):
        selective_scan(x, x, A, B, B, jnp.ones(8), implementation="gpu")


def draw_ssd(rng, B, T, wide):
    """Two groups, and more than one block of 64 of the head and of the states."""
    return {
        "x": rng.normal(size=(B, T, 2, 70)),
        "dt": 10 ** rng.uniform(-3, 0, (B, T, 2)),
        "A": -(10 ** rng.uniform(-2, 0, 2)),
        "B": rng.normal(size=(B, T, 2, 66)),
        "C": rng.normal(size=(B, T, 2, 66)),
        "D": rng.normal(size=2),
    }


def draw_mlstm(rng, B, T, wide):
    q, k = rng.normal(size=(2, B, T, 1, 66))
    i, f = rng.uniform(-3, 3, (2, B, T, 1))
    return {"q": q, "k": k, "v": rng.normal(size=(B, T, 1, 64)), "i": i, "f": f}


def draw_mlstm_state(rng, B):
    return rng.normal(size=(B, 1, 66, 64)), rng.normal(size=(B, 1, 66)), rng.uniform(0, 2, (B, 1))


def draw_wkv7(rng, B, T, wide):
    keys = rng.normal(size=(B, T, 1, 5))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    r, k = rng.normal(size=(2, B, T, 1, 5))
    log_w = -(10 ** rng.uniform(-2, 0, (B, T, 1, 5)))
    return {"r": r, "log_w": log_w, "k": k, "v": rng.normal(size=(B, T, 1, 70)), "a": -keys, "b": keys / 2}


def state(*shape):
    return lambda rng, B: rng.normal(size=(B, *shape))


AT_EDGES = Case(1, 150, ((3, 64, 100, 127),))
LARGE = {
    "mlstm": (OPS["mlstm"]._replace(draw=draw_mlstm, draw_state=draw_mlstm_state, output_shape=(1, 64)), AT_EDGES),
    "ssd": (OPS["ssd"]._replace(draw=draw_ssd, draw_state=state(2, 70, 66), output_shape=(2, 70)), AT_EDGES),
    "wkv7": (
        OPS["wkv7"]._replace(draw=draw_wkv7, draw_state=state(1, 70, 5), output_shape=(1, 70)),
        Case(1, 19, ((3, 8),)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_across_chunks_and_blocks(name):
    """Documents that begin inside a chunk, at its edges and beyond the first; a last chunk that is not whole."""
    op, case = LARGE[name]
    given = problem(op, case)
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, run(op, *given, implementation="reference"))
    assert error(run(op, *cast(given, jnp.float32), implementation="gpu"), wanted) < 1e-4


def copy(x, *, wait: bool):
    """`x`, by a bulk copy to SMEM that the kernel waits for, or not."""

    def body(x_ref, y_ref, block, barrier):
        plgpu.copy_gmem_to_smem(x_ref, block, barrier)
        if wait:
            plgpu.barrier_wait(barrier)
        y_ref[...] = block[...]
        if not wait:
            plgpu.barrier_wait(barrier)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return gpu.kernel(body, shape, x, scratch_types=(plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()))


def test_a_race_is_an_error():
    x = jnp.ones((128, 16))
    np.testing.assert_array_equal(copy(x, wait=True), x)
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(copy(x, wait=False))


def test_what_nobody_wrote_is_nan():
    def body(x_ref, y_ref, block):
        y_ref[...] = x_ref[...] + block[...]

    x = jnp.ones((128, 16))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = gpu.kernel(body, shape, x, scratch_types=(plgpu.SMEM(x.shape, x.dtype),))
    assert np.all(np.isnan(call))
