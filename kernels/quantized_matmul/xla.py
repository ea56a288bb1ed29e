"""Quantized matmul for XLA: a loop over blocks of rows of the matrix, each dequantized just before it is multiplied.

No more than a block is ever dense: about 256 N float32, which on a CPU stay in the cache. Where a block is one group or
less, the scale multiplies its product, or dy, instead of its weights.
"""

import jax
import jax.numpy as jnp
import numpy as np

from phyla.kernels.arguments import align
from phyla.kernels.dispatch import platform
from phyla.kernels.quantized_matmul.codebook import Codebook
from phyla.kernels.quantized_matmul.codes import Codes
from phyla.kernels.quantized_matmul.formats import (
    Channels,
    Format,
    Outliers,
    rounded_like_weights,
    spread,
)
from phyla.kernels.quantized_matmul.ggml import Ggml
from phyla.kernels.quantized_matmul.nf4 import CODE_BOOK, NF4
from phyla.kernels.quantized_matmul.packing import packed_rows, signed, unit, unpack

ROWS, LEAST, FEW = 256, 64, 32
"""A block's rows; with at most FEW rows of x it is one group if that has at least LEAST rows."""


def product(x, w):
    """X [M, K] by the matrix that `w` stands for; sums in float32."""
    if isinstance(w, Outliers):
        outer = _dot(x.at[:, w.columns].get(mode="fill", fill_value=0), w.values)
        return (product(x.at[:, w.columns].set(0, mode="drop").astype(jnp.float32), w.body) + outer).astype(x.dtype)
    M, K, N = len(x), *w.shape
    dtype = _dtype(x)
    x_MxK = rounded_like_weights(x, w).astype(dtype)
    blocks, scales = _Blocks(w, M), _scales(w)

    def add(y_MxN, start, rows):
        codes_RxN, scale = blocks.cut(scales, start, rows)
        x_MxR = jax.lax.dynamic_slice_in_dim(x_MxK, start, rows, 1)
        y_RxN = _dot(x_MxR, codes_RxN.astype(dtype))
        return y_MxN + (y_RxN if scale is None else y_RxN * scale)

    y_MxN = align(jnp.zeros((M, N)), x)[0]
    if blocks.whole:
        y_MxN = jax.lax.fori_loop(0, blocks.whole, lambda i, y: add(y, i * blocks.rows, blocks.rows), y_MxN)
    if blocks.left:
        y_MxN = add(y_MxN, K - blocks.left, blocks.left)
    return (y_MxN * w.scale if isinstance(w, Channels) else y_MxN).astype(x.dtype)


def transposed(g, w):
    """G [M, N] by the transposed matrix."""
    if isinstance(w, Outliers):
        outer = _dot(g, w.values.T)
        return transposed(g.astype(jnp.float32), w.body).at[:, w.columns].set(outer, mode="drop").astype(g.dtype)
    M, K = len(g), w.shape[0]
    dtype = _dtype(g)
    g_MxN = g.astype(jnp.float32) * w.scale if isinstance(w, Channels) else g.astype(jnp.float32)
    blocks, scales = _Blocks(w, M), _scales(w)

    def part(start, rows):
        codes_RxN, scale = blocks.cut(scales, start, rows)
        scaled_MxN = g_MxN if scale is None else g_MxN * scale
        contract = (((1,), (1,)), ((), ()))
        return _dot(scaled_MxN.astype(dtype), codes_RxN.astype(dtype), contract).astype(g.dtype)

    parts = []
    if blocks.whole:
        dx_CxMxR = jax.lax.map(lambda i: part(i * blocks.rows, blocks.rows), jnp.arange(blocks.whole))
        parts.append(jnp.swapaxes(dx_CxMxR, 0, 1).reshape(M, -1))
    if blocks.left:
        parts.append(part(K - blocks.left, blocks.left))
    return jnp.concatenate(parts, 1)


class _Blocks:
    """How the rows of a matrix are cut: `whole` times `rows`, then `left`."""

    def __init__(self, w: Format, M: int):
        self.w, self.group = w, w.group if isinstance(w, Codes | NF4) else 0
        if self.group >= max(ROWS, w.shape[0]):  # one group, in any parts
            self.rows = ROWS
        elif self.group >= ROWS:
            assert isinstance(w, Codes)
            fits = (rows for rows in range(ROWS, 1, -1) if self.group % rows == 0 and rows % unit(w.bits) == 0)
            self.rows = next(fits, self.group)
        elif self.group >= LEAST and M <= FEW:
            self.rows = self.group
        else:
            self.rows = ROWS // self.group * self.group if self.group else ROWS
        self.whole, self.left = divmod(w.shape[0], self.rows)

    def cut(self, scales_GxN, start, rows):
        """Rows of the matrix and what their product is still to be multiplied with."""
        w, group = self.w, self.group
        if isinstance(w, Channels):
            return jax.lax.dynamic_slice_in_dim(w.codes, start, rows), None
        if isinstance(w, Codebook):
            return w.cut(start, rows), None
        if isinstance(w, Ggml):
            return w.cut(start, rows).T, None
        assert isinstance(w, Codes | NF4)
        packed = jax.lax.dynamic_slice_in_dim(w.codes, start * w.bits // 8, packed_rows(rows, w.bits))
        numbers = unpack(packed, w.bits)[:rows]
        codes_RxN = _quantile(numbers) if isinstance(w, NF4) else signed(numbers, w.bits)
        first, groups = start // group, (rows + group - 1) // group
        scale = jax.lax.dynamic_slice_in_dim(scales_GxN, first, groups)
        if isinstance(w, Codes) and w.zero is not None:
            zero = jax.lax.dynamic_slice_in_dim(w.of_groups(w.zero), first, groups)
            codes_RxN = codes_RxN.astype(jnp.float32) - (zero if groups == 1 else spread(zero, group, rows))
        return (codes_RxN, scale) if groups == 1 else (codes_RxN * spread(scale, group, rows), None)


def _scales(w):
    return w.scales() if isinstance(w, Codes | NF4) else None


def _quantile(nibbles):
    """The code book's values by selection, which is faster than a table on a CPU.

    The first of four levels is made of bits: a choice between two constants would be two arrays of them, which
    automatic differentiation computes before the loop.
    """
    book = [int(bits) for bits in CODE_BOOK.view(np.int32)]
    odd = -(nibbles & 1).astype(jnp.int32)
    values = [b ^ (odd & (a ^ b)) for b, a in zip(book[::2], book[1::2], strict=True)]
    for bit in (2, 4, 8):
        one = (nibbles & bit) != 0
        values = [jnp.where(one, a, b) for b, a in zip(values[::2], values[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)


def _dtype(x):
    """What is multiplied: on a CPU float32, which it is fastest with; elsewhere the dtype of x."""
    return jnp.float32 if platform() == "cpu" else x.dtype


def _dot(a, b, contract=(((1,), (0,)), ((), ()))):
    dtype = jnp.promote_types(a.dtype, b.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), contract, precision=precision, preferred_element_type=jnp.float32
    )
