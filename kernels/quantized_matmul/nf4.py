"""NF4: sixteen normal quantiles in blocks of 64, whose scales are themselves in eight bits.

Dettmers et al., QLoRA (arXiv 2305.14314), sections 3 and 4.1, as bitsandbytes does it: where 64 divides K, the codes
and scales are those that it computes for the matrix stored as [N, K].
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from phyla.kernels.quantized_matmul.formats import STATIC, Format, blocks, spread
from phyla.kernels.quantized_matmul.packing import pack, unpack

BLOCK, SCALE_BLOCK = 64, 256

CODE_BOOK = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""Quantiles of the normal distribution, scaled to ±1, with an exact 0 (appendix E of the paper)."""

DECADES = np.array([10.0 ** (i - 6) for i in range(7)] + [1 / (0.9 * 128.5 / 128 - 0.8)], np.float32)
"""Dettmers, 8-bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561): of the first 127 magnitudes, 2^i
lie evenly in decade i of 1e-6 … 1. Number t = 2^i + j is 10^(i-6) (0.1 + 0.9 (j + 1/2) / 2^i), which is 10^(i-6)
(0.9 (t + 1/2) / 2^i - 0.8). Number 128 is 1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Format):
    """A quantile of the normal distribution · the scale of its block of 64 rows in a column.

    The scales' codes are in the order of the matrix's blocks; their own scales go by 256 blocks in bitsandbytes' order,
    which counts the blocks of a column, then the columns.
    """

    codes: jax.Array  # uint8 [ceil(K / 2), N], the even row in the low half
    scale_codes: jax.Array  # uint8 [ceil(K / 64), N]
    scale_scales: jax.Array  # float32 [ceil(blocks / 256)]
    scale_mean: jax.Array  # float32 []
    rows: int = dataclasses.field(metadata=STATIC)  # K
    bits: ClassVar[int] = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        return *self.codes.shape[:-2], self.rows, self.codes.shape[-1]

    @property
    def group(self) -> int:
        """Rows that share a scale."""
        return BLOCK

    def scales(self) -> jax.Array:
        """Of the blocks, float32 [ceil(K / 64), N]."""
        return dynamic_value(self.scale_codes) * self.scales_of_scales() + self.scale_mean

    def scales_of_scales(self) -> jax.Array:
        """Of the blocks, float32 [ceil(K / 64), N]; [1, N] where whole columns share them."""
        G, N = self.scale_codes.shape
        whole = SCALE_BLOCK % G == 0
        size = SCALE_BLOCK // G if whole else SCALE_BLOCK
        each = jnp.broadcast_to(self.scale_scales[:, None], (len(self.scale_scales), size)).ravel()
        return each[None, :N] if whole else each[: G * N].reshape(N, G).T

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        return self._values(self.codes, self.scales())

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        codes, scale_codes = (jnp.take(each, columns, axis=1) for each in (self.codes, self.scale_codes))
        G = len(scale_codes)
        blocks_GxM = columns * G + jnp.arange(G)[:, None]  # their numbers, in the order of `scale_scales`
        scales_GxM = dynamic_value(scale_codes) * jnp.take(self.scale_scales, blocks_GxM // SCALE_BLOCK)
        return self._values(codes, scales_GxM + self.scale_mean)

    def _values(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        values = jnp.take(jnp.asarray(CODE_BOOK), unpack(codes)[: self.rows], mode="clip")
        return values * spread(scales, BLOCK, self.rows)


def quantize_nf4(w: jax.Array) -> NF4:
    """Round w [K, N] to the nearest quantile in blocks of 64 rows (the last may be shorter), then the scales."""
    K, N = w.shape
    w_GxPxN = blocks(w, BLOCK)
    scale_GxN = jnp.abs(w_GxPxN).max(1)
    codes = _nearest(w_GxPxN * _reciprocal(scale_GxN)[:, None], CODE_BOOK).reshape(-1, N)[:K]
    mean = scale_GxN.mean()
    centred = (scale_GxN - mean).T.ravel()
    centred = jnp.pad(centred, (0, -centred.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scales = jnp.abs(centred).max(1)
    scale_codes = _nearest(centred * _reciprocal(scales)[:, None], dynamic_value(jnp.arange(256, dtype=jnp.uint8)))
    scale_codes = scale_codes.ravel()[: scale_GxN.size].reshape(N, -1).T
    return NF4(codes=pack(codes), scale_codes=scale_codes, scale_scales=scales, scale_mean=mean, rows=K)


def dynamic_value(codes: jax.Array, decade: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """Uint8 to the 256 numbers that it stands for in increasing order: -0.993 … 0 (code 127) … 1, float32.

    By arithmetic: a table of 256 has no fast look-up on a TPU. `decade` looks up `DECADES` by int32 numbers of 0 to 7
    (what it makes of -1 is not used); None: by selections.
    """
    t = codes.astype(jnp.int32) - 127
    middle = jnp.abs(t).astype(jnp.float32) + 0.5
    bits = jax.lax.bitcast_convert_type(middle, jnp.int32)
    mantissa = jax.lax.bitcast_convert_type(bits & 0x7FFFFF | 0x3F800000, jnp.float32)  # middle / 2^i, of [1, 2)
    value = (decade or _decade)((bits >> 23) - 127) * (0.9 * mantissa - 0.8)
    return jnp.where(t < 0, -value, jnp.where(t == 0, 0.0, value))


def _decade(number: jax.Array) -> jax.Array:
    found = jnp.full(number.shape, DECADES[0])
    for i in range(1, 8):
        found = jnp.where(number >= i, DECADES[i], found)
    return found


def _nearest(x, values):
    """The number, uint8, of the nearest of `values`, which increase; of two as near, the first."""
    middles = jnp.asarray((values[1:] + values[:-1]) / 2)
    half = len(values) // 2  # by bisection: never an array of x times the values
    found = jnp.where(x > middles[half - 1], half, 0)
    while half > 1:
        half //= 2
        found = found + jnp.where(x > jnp.take(middles, found + half - 1, mode="clip"), half, 0)
    return found.astype(jnp.uint8)


def _reciprocal(scale):
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))
