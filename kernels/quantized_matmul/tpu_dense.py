"""Quantized matmul for TPUs, on blocks of the matrix that are dequantized on chip, forward and transposed."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.quantized_matmul.tpu_codes import outliers, unpacked
from phyla.kernels.quantized_matmul.tpu_nf4 import quantiles, scales
from phyla.kernels.tpu import pallas_call


def matmul_dense(x, a, *, kind, group, block, dtype, transpose=False):
    """X [M, K] by the matrix, or [M, N] by the transposed one.

    The block is multiplied in x's dtype (its values rounded to it) and sums are float32. It costs as much as 10 to 60
    rows of x to dequantize, by format, and that once for every block of rows of x.

    Args:
        x: bfloat16 or float32.
        a: arrays, by name: codes; scale, [1, N] or, of int4 and NF4, [G, N]; zero [G, N]; outliers' outer_x [M, O] and
            outer_w [O, N]. Transposed, x is already multiplied by a [1, N] scale and there are no outliers.
        kind: "int8", "float8", "int4" or "nf4".
        group: rows of the matrix that share a scale; K if there is one for a column.
        block: (rows of x, results, terms of a sum), which divide M and the last.
        dtype: of the result.
        transpose: see above.
    """
    (M, terms), codes = x.shape, a["codes"]
    packing = 2 if kind in ("int4", "nf4") else 1
    K, N = codes.shape[0] * packing, codes.shape[1]
    bm, bo, bc = block
    bk, bn = (bo, bc) if transpose else (bc, bo)
    at = (lambda o, c: (o, c)) if transpose else (lambda o, c: (c, o))  # the matrix's block
    given = {
        "x": (x, pl.BlockSpec((bm, bc), lambda m, o, c: (m, c))),
        "codes": (codes, pl.BlockSpec((bk // packing, bn), lambda m, o, c: at(o, c))),
    }
    if packing == 2:
        for name in a.keys() & {"scale", "zero", "of_scales"}:
            if a[name].shape[0] == 1 < K // group:
                given[name] = a[name], pl.BlockSpec((1, bn), lambda m, o, c: (0, at(o, c)[1]))
                continue
            by_block = a[name].reshape(K // bk, bk // group, N)
            given[name] = by_block, pl.BlockSpec((None, bk // group, bn), lambda m, o, c: (at(o, c)[0], 0, at(o, c)[1]))
    elif not transpose:
        given["scale"] = a["scale"], pl.BlockSpec((1, bn), lambda m, o, c: (0, o))
    if "mean" in a:
        given["mean"] = a["mean"], pl.BlockSpec((1, 1), lambda m, o, c: (0, 0))
    for name in a.keys() & {"outer_x", "row_scale"}:
        given[name] = a[name], pl.BlockSpec((bm, a[name].shape[1]), lambda m, o, c: (m, 0))
    if "outer_w" in a:
        given["outer_w"] = a["outer_w"], pl.BlockSpec((a["outer_w"].shape[0], bn), lambda m, o, c: (0, o))
    scratch = {"total": pltpu.VMEM((bm, bo), jnp.float32)}
    if packing == 2:
        scratch["dense"] = pltpu.VMEM((bk, bn), jnp.float32 if kind == "nf4" else x.dtype)
    if kind == "nf4":
        scratch["scales"] = pltpu.VMEM((bk // group, bn), jnp.float32)
    names = [*given, "y", *scratch]

    def kernel(*refs):
        _kernel(dict(zip(names, refs, strict=True)), kind, group, transpose)

    results = K if transpose else N
    bytes_accessed = sum(array.size * array.dtype.itemsize for array, _ in given.values()) + M * results * 4
    return pallas_call(
        kernel,
        jax.ShapeDtypeStruct((M, results), dtype),
        *(array for array, _ in given.values()),
        grid=(M // bm, pl.cdiv(results, bo), terms // bc),
        in_specs=[spec for _, spec in given.values()],
        out_specs=pl.BlockSpec((bm, bo), lambda m, o, c: (m, o)),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20
        ),
        cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0, bytes_accessed=bytes_accessed),
        name=f"quantized_matmul_{kind}" + ("_transposed" if transpose else ""),
    )


def _kernel(ref, kind, group, transpose):
    c, total, x = pl.program_id(2), ref["total"], ref["x"]

    @pl.when(c == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    if "dense" in ref:
        _dequantize(ref, kind, group, x.dtype)
        block = ref["dense"][...]
    else:
        block = ref["codes"][...].astype(x.dtype)
    total[...] += _dot(x[...], block, transpose)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        y = total[...]
        if "dense" not in ref and not transpose:
            y *= ref["scale"][...]
        if "row_scale" in ref:
            y *= ref["row_scale"][...]
        if "outer_x" in ref:
            y += outliers(ref["outer_x"][...], ref["outer_w"][...])
        ref["y"][...] = y.astype(ref["y"].dtype)


def _dequantize(ref, kind, group, dtype):
    codes, scale, dense = ref["codes"], ref["scale"], ref["dense"]
    if kind == "nf4":
        ref["scales"][...] = scales(scale[...], ref["of_scales"][...], ref["mean"][...])
        scale = ref["scales"]
    for i in range(dense.shape[0] // group):
        number = unpacked(codes[i * group // 2 : (i + 1) * group // 2, :]).astype(jnp.int32)
        of_group = scale[i : i + 1, :]
        if kind == "nf4":
            values = quantiles(number, of_group, dtype)
        else:
            if "zero" in ref:
                number -= ref["zero"][i : i + 1, :].astype(jnp.int32)
            values = (number.astype(jnp.float32) * of_group).astype(dense.dtype)
        dense[i * group : (i + 1) * group, :] = values


def _dot(a, b, transpose=False):
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32, precision=precision)
