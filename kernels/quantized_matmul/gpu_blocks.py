"""Quantized matmul for Hopper, on blocks of the matrix that are dequantized on chip, forward and transposed.

A thread block has 128 results for some rows of x, and goes through the terms of their sums 64 codes at a time, which
arrive in SMEM meanwhile. Codes become bfloat16 in registers, those go to SMEM, and the matrix unit multiplies there.

| | one number a code (int8, float8) | two (int4, NF4) |
|---|---|---|
| multiplied | the code; its column's scale multiplies sums, or dy | code · scale, rounded as x is |
| the halves of a byte | | two matrices, of the even and of the odd rows, with their own columns of x, or results |
| dynamic int8 | int8, summed in int32; codes are transposed on the way, as that unit needs them | |

| rows of x | up to 64 | more |
|---|---|---|
| product | results × rows of x, whose multiple is 8 | rows of x × results, whose multiple is 64 |
| rows of x in a block | all | 128 (64 in float32) |
| sums | divided among blocks until every multiprocessor has one, and added by XLA | whole |

A float32 is three parts of bfloat16, as in gpu_attention.py, and so is code · scale for it: six products. A code alone
is exact in one part: three products.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels.gpu import CHIPS, kernel, load, pad, pipeline, store
from phyla.kernels.gpu_attention import ACROSS, DOWN, SQUARE, columns, put, rows
from phyla.kernels.quantized_matmul.nf4 import CODE_BOOK

FEW = 64
"""Rows of x up to which a product is bound by reading the weights."""
RESULTS, DEPTH = 128, 64
"""Of a block, and terms (rows or columns of codes) in a step."""
MANY = {1: 128, 3: 64}
"""Rows of x in a block by its parts, of which two steps' lie in SMEM."""
SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (4, 8), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
"""Every number on its own, a warp having 4 × 8 of them: bytes are read by rows and written by columns."""


def matmul(x, a, *, kind, planes, piece, transpose, dtype):
    """X [M, K] by the matrix, or [M, N] by the transposed one.

    Args:
        x: [parts, planes or 1, M, rows or columns of codes], bfloat16 or int8.
        a: arrays, by name: codes [R, N]; scale, [1, N] or [ceil(R / piece), N]; shift like it; row_scale [M].
            Transposed, x is already multiplied by a [1, N] scale.
        kind: "int8", "float8", "int4" or "nf4".
        planes: numbers in a code, of matrix rows that follow each other.
        piece: rows of codes that share a scale, at most a step's; None if the scale is of a column.
        transpose: see above.
        dtype: of the result.
    """
    codes = a["codes"]
    (parts, _, M, _), (R, N) = x.shape, codes.shape
    few, integers = M <= FEW, x.dtype == jnp.int8
    br, bn = (RESULTS // planes, DEPTH) if transpose else (DEPTH, RESULTS)
    bm = M + -M % 8 if few else MANY[parts]
    x = pad(x.reshape(-1, *x.shape[2:]), 1, bm, 2, bn if transpose else br)
    sizes = {"codes": (0, br, 1, bn), "row_scale": (0, bm)}
    of_scale = (0, br // piece, 1, bn) if piece else (1, bn)
    a = {name: pad(v, *sizes.get(name, of_scale)) for name, v in a.items()}
    operands, rows_of_x, _ = x.shape
    x = x.reshape(operands * rows_of_x, -1)  # of two dimensions, as many as a bulk copy takes beside `jax.vmap`'s
    Rp, Np = a["codes"].shape
    outputs = planes if transpose else 1
    results, terms = (Rp, Np // bn) if transpose else (Np, Rp // br)
    width = br if transpose else bn  # results of a plane in a block
    splits = _splits(terms, results // width) if few else 1
    steps = terms // splits
    staged = {"codes": (a["codes"], (br, bn))}
    if piece:
        staged |= {name: (a[name], (br // piece, bn)) for name in ("scale", "shift") if name in a}
    direct = {name: a[name] for name in a if name not in staged}
    names = ["x", *staged, *direct, "y", "dense"]

    def body(*refs):
        ref = dict(zip(names, refs, strict=True))
        block, m, s = (jax.lax.axis_index(name) for name in "oms")

        def sums(*totals):
            def step(_, *blocks_and_carry):
                *blocks_s, carry = blocks_and_carry
                block_s = dict(zip(staged, blocks_s[operands:], strict=True))
                _fill(ref["dense"], block_s, kind, piece, integers)
                plgpu.commit_smem()
                for plane, parts_s in enumerate(ref["dense"]):
                    total = totals[plane if transpose else 0]
                    x_parts = blocks_s[0 if transpose else plane : operands : operands // parts]
                    _add(total, x_parts, parts_s, few, turned=transpose or integers)
                plgpu.wgmma_wait(0)
                return carry

            def at(i):
                i += s * steps
                return (block, i) if transpose else (i, block)

            def of_operand(q):
                return plgpu.BlockSpec((bm, DEPTH), lambda i: (q * (rows_of_x // bm) + m, i + s * steps))

            specs = [of_operand(q) for q in range(operands)] + [
                plgpu.BlockSpec(shape, at) for _, shape in staged.values()
            ]
            pipeline(step, specs, (), steps)(*[ref["x"]] * operands, *(ref[name] for name in staged))
            return tuple(total[...] for total in totals)

        shape = (width, bm) if few else (bm, width)
        total = plgpu.WGMMAAccumulatorRef(shape, jnp.int32 if integers else jnp.float32)
        of_results, of_rows = pl.ds(block * width, width), pl.ds(m * bm, bm)
        for plane, y in enumerate(pl.run_scoped(sums, *(total,) * outputs)):
            y = y.astype(jnp.float32)
            if "scale" in direct:
                y *= _factor(ref["scale"].at[0, of_results], shape, 0 if few else 1)
            if "row_scale" in direct:
                y *= _factor(ref["row_scale"].at[of_rows], shape, 1 if few else 0)
            store(ref["y"].at[(s, plane, of_results, of_rows) if few else (s, plane, of_rows, of_results)], y)

    shape = (splits, outputs, results, rows_of_x) if few else (1, outputs, rows_of_x, results)
    out = jax.ShapeDtypeStruct(shape, jnp.float32 if few else dtype)
    arguments = [x, *(array for array, _ in staged.values()), *direct.values()]
    moved = sum(v.size * v.dtype.itemsize for v in (*arguments, out))
    tile = (bn, br) if integers else (br, bn)
    values = parts if piece else 1
    y = kernel(
        body,
        out,
        *arguments,
        grid=(results // width, rows_of_x // bm, splits),
        grid_names=("o", "m", "s"),
        kernel_name=f"quantized_matmul_{kind}" + ("_transposed" if transpose else ""),
        scratch_types=([[plgpu.SMEM(tile, x.dtype)] * values] * planes,),
        cost_estimate=pl.CostEstimate(flops=2 * parts * M * R * planes * N, transcendentals=0, bytes_accessed=moved),
    )
    y = jnp.swapaxes(y.sum(0), 1, 2) if few else y[0]
    y = jnp.moveaxis(y, 0, 2).reshape(rows_of_x, -1)[:M, : R * planes if transpose else N]
    return y.astype(dtype)


def _splits(terms, blocks):
    """The most that divide the terms without making more blocks than there are multiprocessors."""
    most = max(1, CHIPS["h100"][1] // blocks)
    return max(splits for splits in range(1, min(most, terms) + 1) if terms % splits == 0)


def _fill(dense, block_s, kind, piece, integers):
    """Write what the codes stand for, or as much of it as `piece` says, to SMEM: a list of parts for each plane."""
    codes_s = block_s["codes"]
    if integers:
        plgpu.store(dense[0][0].T, plgpu.load(codes_s, layout=SINGLE, optimized=False), optimized=False)
        return
    width = DEPTH if piece else codes_s.shape[1]  # at a time, for as long as registers last
    for start in range(0, codes_s.shape[1], width):
        at = pl.ds(start, width)
        codes = plgpu.load(codes_s.at[:, at], layout=SQUARE, optimized=False)
        if not piece:
            put(dense[0], codes.astype(jnp.float32) if kind == "float8" else _number(codes))
            continue
        spread = {name: _by_pieces(block_s[name], at, piece, codes.shape) for name in block_s if name != "codes"}
        for plane, parts_s in enumerate(dense):
            v = (_quantile if kind == "nf4" else _signed)(codes, plane) * spread["scale"]
            put([part_s.at[:, at] for part_s in parts_s], v - spread["shift"] if "shift" in spread else v)


def _by_pieces(ref, at, piece, shape):
    """Columns `at` of rows [pieces, N] in SMEM, each as `piece` rows of a matrix."""
    spread = [rows(load(ref.at[i, at], ACROSS), shape[0]) for i in range(shape[0] // piece)]
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=SQUARE)
    found = spread[0]
    for i, of_piece in enumerate(spread[1:], 1):
        found = jnp.where(row >= i * piece, of_piece, found)
    return found


def _number(codes):
    """Int8 as float32, by way of bfloat16, which takes fewer instructions."""
    return codes.astype(jnp.bfloat16).astype(jnp.float32)


def _signed(codes, plane):
    """The low or high four bits in two's complement, float32: the last bits of a large number, which is taken off."""
    large = 2.0**19 if plane else 2.0**23  # where bit 4 of the mantissa, or bit 0, is worth 1
    bits = np.float32(large).view(np.int32) + (0x80 if plane else 0x8)
    number = (codes.astype(jnp.int32) & (0xF0 if plane else 0xF)) ^ int(bits)
    return jax.lax.bitcast_convert_type(number, jnp.float32) - (large + 8.0)


def _quantile(codes, plane):
    """The code book's value of the low or high four bits, by selection."""
    codes = codes.astype(jnp.int32)
    values = [float(v) for v in CODE_BOOK]
    for bit in range(4):
        one = codes & (1 << bit + 4 * plane) != 0
        values = [jnp.where(one, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _add(total, x, w, few, turned):
    """Add the product of operands in parts: what is smaller than the last part's rounding is left out.

    `turned`: w is [results, terms], and not [terms, results].
    """
    for i, w_part in enumerate(w):
        for x_part in x[: len(x) - i]:
            if few:
                plgpu.wgmma(total, w_part if turned else w_part.T, x_part.T)
            else:
                plgpu.wgmma(total, x_part, w_part.T if turned else w_part)


def _factor(ref, shape, axis):
    """A vector in GMEM, of rows (0) or columns (1) of a matrix of this shape, as such a matrix."""
    if axis:
        return rows(load(ref, ACROSS), shape[0])
    return columns(load(ref, DOWN), shape[1])
