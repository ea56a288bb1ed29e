"""GGML's block formats: the bytes of a GGUF file, and the numbers that they stand for.

A GGUF matrix has the outputs as rows, and blocks along a row; so each column of ours is a row of blocks. What is held,
and written to disk, is exactly what a GGUF file has. The numbers are those of the `gguf` package, to the bit: a code
times its scale is exact in float32, and so there is one rounding at most.

| name | rows of a block | bytes | bits a weight | value |
|---|---|---|---|---|
| q8_0 | 32 | 34 | 8.5 | d · code of 8 bits |
| q5_0 | 32 | 22 | 5.5 | d · (code of 5 bits - 16) |
| q4_0 | 32 | 18 | 4.5 | d · (code of 4 bits - 8) |
| q4_1 | 32 | 20 | 5 | d · code + m |
| q6_k | 256 | 210 | 6.5625 | d · scale of 16 rows, 8 bits · (code of 6 bits - 32) |
| q4_k | 256 | 144 | 4.5 | d · scale of 32 rows, 6 bits · code of 4 bits - m · minimum of 6 bits |
| q2_k | 256 | 84 | 2.625 | d · scale of 16 rows, 4 bits · code of 2 bits - m · minimum of 4 bits |

d and m are float16.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phyla.kernels.quantized_matmul.formats import STATIC, Format


def half(x: jax.Array) -> jax.Array:
    """The float16 of two bytes, uint8 [..., 2], as float32 [..., 1]."""
    return jax.lax.bitcast_convert_type(x, jnp.float16).astype(jnp.float32)[..., None]


def bits_of(x: jax.Array, bits: int) -> jax.Array:
    """Uint8 [..., B] to [..., 8 / bits, B]: the lowest bits of all bytes, then the next."""
    return jnp.stack([x >> first & (1 << bits) - 1 for first in range(0, 8, bits)], -2)


def scales_and_minima(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of q4_k: eight and eight of six bits out of twelve bytes [..., 12].

    The first four of each are the low bits of four bytes, whose two high bits go with the nibbles of the last four.
    """
    scale, minimum, rest = x[..., :4], x[..., 4:8], x[..., 8:]
    return (
        jnp.concatenate([scale & 63, rest & 15 | scale >> 6 << 4], -1),
        jnp.concatenate([minimum & 63, rest >> 4 | minimum >> 6 << 4], -1),
    )


def _flat(x: jax.Array, parts: int) -> jax.Array:
    """The last dimensions as one, then in so many parts: [..., parts, n]."""
    return x.reshape(*x.shape[:2], parts, -1)


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _signed(x: jax.Array) -> jax.Array:
    return _float(jax.lax.bitcast_convert_type(x, jnp.int8))


def _q8_0(b: jax.Array) -> jax.Array:
    return half(b[..., :2]) * _signed(b[..., 2:])


def _q4_0(b: jax.Array) -> jax.Array:
    return half(b[..., :2]) * (_float(_flat(bits_of(b[..., 2:], 4), 1)[..., 0, :]) - 8)


def _q4_1(b: jax.Array) -> jax.Array:
    return half(b[..., :2]) * _float(_flat(bits_of(b[..., 4:], 4), 1)[..., 0, :]) + half(b[..., 2:4])


def _q5_0(b: jax.Array) -> jax.Array:
    high = b[..., 2:6, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
    codes = _flat(bits_of(b[..., 6:], 4), 1) | _flat(high, 1) << 4
    return half(b[..., :2]) * (_float(codes[..., 0, :]) - 16)


def _q2_k(b: jax.Array) -> jax.Array:
    scale = half(b[..., 80:82]) * _float(b[..., :16] & 15)
    minimum = half(b[..., 82:84]) * _float(b[..., :16] >> 4)
    codes = _flat(bits_of(_flat(b[..., 16:80], 2), 2), 16)
    return scale[..., None] * _float(codes) - minimum[..., None]


def _q4_k(b: jax.Array) -> jax.Array:
    scale, minimum = scales_and_minima(b[..., 4:16])
    scale, minimum = half(b[..., :2]) * _float(scale), half(b[..., 2:4]) * _float(minimum)
    codes = _flat(bits_of(_flat(b[..., 16:], 4), 4), 8)
    return scale[..., None] * _float(codes) - minimum[..., None]


def _q6_k(b: jax.Array) -> jax.Array:
    low = bits_of(_flat(b[..., :128], 2), 4)  # [..., 2, 2, 64]
    high = bits_of(_flat(b[..., 128:192], 2), 2)  # [..., 2, 4, 32]
    codes = _float(_flat(low, 16) | _flat(high, 16) << 4) - 32
    return (half(b[..., 208:]) * _signed(b[..., 192:208]))[..., None] * codes


class Kind(NamedTuple):
    """A block format."""

    rows: int
    """Of a block."""
    size: int
    """In bytes."""
    read: Callable[[jax.Array], jax.Array]
    """Bytes [N, B, size] to float32 [N, B, …], in the order of the rows."""
    instead: str | None = None
    """What llama.cpp takes where the rows are no whole blocks (of q2_k: what it took before it had iq4_nl)."""


KINDS = {
    "q8_0": Kind(32, 34, _q8_0),
    "q5_0": Kind(32, 22, _q5_0),
    "q4_0": Kind(32, 18, _q4_0),
    "q4_1": Kind(32, 20, _q4_1),
    "q6_k": Kind(256, 210, _q6_k, "q8_0"),
    "q4_k": Kind(256, 144, _q4_k, "q5_0"),
    "q2_k": Kind(256, 84, _q2_k, "q4_0"),
}


def fitting(kind: str, rows: int) -> str | None:
    """The kind itself, or the one in its place of which the rows are whole blocks, if any."""
    if rows % KINDS[kind].rows == 0:
        return kind
    instead = KINDS[kind].instead
    return instead and fitting(instead, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ggml(Format):
    """The blocks of a tensor in a GGUF file."""

    blocks: jax.Array  # uint8 [N, K / rows of a block · bytes of a block]
    kind: str = dataclasses.field(metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        rows, size, *_ = KINDS[self.kind]
        *stack, N, total = self.blocks.shape
        return *stack, total // size * rows, N

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        return self.cut(0, self.shape[0]).T

    def cut(self, start: jax.Array | int, rows: int) -> jax.Array:
        """Whole blocks of all columns, transposed: float32 [N, rows]."""
        of_block, size, read, _ = KINDS[self.kind]
        N = self.blocks.shape[0]
        bytes_ = jax.lax.dynamic_slice_in_dim(self.blocks, start // of_block * size, rows // of_block * size, 1)
        return read(bytes_.reshape(N, -1, size)).reshape(N, rows)

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        return dataclasses.replace(self, blocks=jnp.take(self.blocks, columns, axis=0)).materialize()
