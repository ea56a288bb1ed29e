"""Quantized matmul for TPUs, on the codes: int8 times int8 on the matrix unit, scales after it.

For few rows of x, whatever is done to a weight costs more than what is done to x or to a product. So weights stay
integers: x is written as a sum of int8 planes (the first has a row's largest magnitude at 127, the next the remainder,
254 times finer: two for bfloat16, three for float32), and four-bit codes are unpacked to int8. A group's products are
exact integers; they are scaled and added in float32. Dynamic int8 is the same with one plane, for any number of rows.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.quantized_matmul.formats import nonzero
from phyla.kernels.tpu import pallas_call

FINER = 254
"""A plane of x against the one before."""


def unpacked(packed):
    """Uint8 [R / 2, C] to the four-bit numbers in two's complement, int8 [R, C]."""
    return pltpu.bitcast(packed, jnp.int4).astype(jnp.int8)


def matmul_codes(x_MxK, a, *, kind, group, block, count, dtype):
    """X [M, K] times integer weights.

    Args:
        x_MxK: float.
        a: arrays, by name: codes; scale [1, N] of int8 and [G, N] of the others; int4's zero [G, N]; outliers' outer_x
            [M, O] and outer_w [O, N].
        kind: "int8" or "int4".
        group: rows that share a scale; K for int8.
        block: (m, n, k) that divide M and K; with more than one plane, m = M.
        count: planes of x.
        dtype: of the result.
    """
    (M, K), N = x_MxK.shape, a["codes"].shape[1]
    bm, bn, bk = block
    G, gb, packing = K // group, max(bk // group, 1), 1 if kind == "int8" else 2
    planes_RxK, row_scale = split(x_MxK, count)
    R = count * bm
    given = {"row_scale": (row_scale, pl.BlockSpec((bm, 1), lambda m, n, k: (m, 0)))}
    planes_GxRxP = jnp.swapaxes(planes_RxK.reshape(-1, G, group), 0, 1)
    if kind == "int8":
        given["x"] = planes_RxK, pl.BlockSpec((R, bk), lambda m, n, k: (m, k))
    else:
        given["x"] = planes_GxRxP, pl.BlockSpec((gb, R, group), lambda m, n, k: (k, m, 0))
    given["codes"] = a["codes"], pl.BlockSpec((bk // packing, bn), lambda m, n, k: (k, n))
    if "outer_w" in a:
        given["outer_w"] = a["outer_w"], pl.BlockSpec((a["outer_w"].shape[0], bn), lambda m, n, k: (0, n))
    for name in a.keys() & {"scale", "zero"}:
        by_block = a[name].reshape(-1, gb, N)  # of int8, one
        given[name] = by_block, pl.BlockSpec((None, gb, bn), lambda m, n, k: (0 if kind == "int8" else k, 0, n))
    if "zero" in a:
        sums_GxR = planes_GxRxP.sum(-1, dtype=jnp.int32).astype(jnp.float32)
        by_block = jnp.swapaxes(sums_GxR.reshape(-1, gb, sums_GxR.shape[1]), 1, 2)
        given["sums"] = by_block, pl.BlockSpec((None, R, gb), lambda m, n, k: (k, m, 0))
    if "outer_x" in a:
        given["outer_x"] = a["outer_x"], pl.BlockSpec((bm, a["outer_x"].shape[1]), lambda m, n, k: (m, 0))
    total = pltpu.VMEM((R, bn), jnp.int32 if kind == "int8" else jnp.float32)
    names = [*given, "y", "total"]

    def kernel(*refs):
        _kernel(dict(zip(names, refs, strict=True)), kind, group)

    bytes_accessed = sum(array.size * array.dtype.itemsize for array, _ in given.values()) + M * N * 4
    return pallas_call(
        kernel,
        jax.ShapeDtypeStruct((M, N), dtype),
        *(array for array, _ in given.values()),
        grid=(M // bm, pl.cdiv(N, bn), K // bk),
        in_specs=[spec for _, spec in given.values()],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        scratch_shapes=[total],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20
        ),
        cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0, bytes_accessed=bytes_accessed),
        name=f"quantized_matmul_{kind}_codes",
    )


def split(x_MxK, count):
    """X as int8 planes [count · M, K], one after the other, and each row's scale of the first, float32 [M, 1]."""
    x_MxK = x_MxK.astype(jnp.float32)
    scale_Mx1 = nonzero(jnp.abs(x_MxK).max(-1, keepdims=True) * (1 / 127))
    rest, planes = x_MxK / scale_Mx1, []
    for _ in range(count):
        whole = jnp.clip(jnp.round(rest), -127, 127)
        planes.append(whole.astype(jnp.int8))
        rest = (rest - whole) * FINER
    return jnp.concatenate(planes), scale_Mx1


def _kernel(ref, kind, group):
    k, total = pl.program_id(2), ref["total"]

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    if kind == "int8":
        total[...] += _dot(ref["x"][...], ref["codes"][...], jnp.int32)
    else:
        _groups(ref, group)
        if "zero" in ref:
            total[...] -= _dot(ref["sums"][...], ref["scale"][...] * ref["zero"][...].astype(jnp.float32), jnp.float32)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        sums_RxN = total[...].astype(jnp.float32)
        rows = ref["y"].shape[0]
        y_MxN = sums_RxN[:rows]
        for plane in range(1, sums_RxN.shape[0] // rows):
            y_MxN += sums_RxN[plane * rows : (plane + 1) * rows] * (1 / FINER**plane)
        y_MxN *= ref["row_scale"][...]
        if kind == "int8":
            y_MxN *= ref["scale"][...]
        if "outer_x" in ref:
            y_MxN += outliers(ref["outer_x"][...], ref["outer_w"][...])
        ref["y"][...] = y_MxN.astype(ref["y"].dtype)


def _groups(ref, group):
    """Add the scaled products of this block's groups; by columns, so that the sum stays in registers."""
    x, codes, scale, total = ref["x"], ref["codes"], ref["scale"], ref["total"]
    groups, R, N = x.shape[0], *total.shape
    width = next(width for width in (512, 256, 128, N) if N % width == 0 and (width == N or width * R <= 16384))
    for start in range(0, N, width):
        columns = slice(start, start + width)
        sums_RxN = total[:, columns]
        for i in range(groups):
            packed = codes[i * group // 2 : (i + 1) * group // 2, columns]
            product = _dot(x[i], unpacked(packed), jnp.int32)
            sums_RxN += product.astype(jnp.float32) * scale[i : i + 1, columns]
        total[:, columns] = sums_RxN


def outliers(x, w):
    """The second small matmul, as exact as float32: a float32 w is two numbers of bfloat16 if x is that."""
    if x.dtype == w.dtype or x.dtype == jnp.float32:
        return _dot(x, w.astype(x.dtype), jnp.float32)
    high = w.astype(x.dtype)
    low = (w.astype(jnp.float32) - high.astype(jnp.float32)).astype(x.dtype)
    return _dot(x, high, jnp.float32) + _dot(x, low, jnp.float32)


def _dot(a, b, dtype):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=dtype, precision=precision)
