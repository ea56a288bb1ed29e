"""Integers of a few bits along the rows of a matrix, in bytes.

As many consecutive rows as fill whole bytes are a unit: 2 of four bits, 4 of two, 8 of three. Of four, of two and of
one bit the first row is in the lowest bits of a byte. Other numbers of bits are the largest of these, in the first
bytes of a unit, and the bits above it, in those that follow.
"""

import math

import jax
import jax.numpy as jnp


def unit(bits: int) -> int:
    """Rows that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def packed_rows(rows: int, bits: int) -> int:
    """Bytes of a column of that many rows."""
    return -(-rows // unit(bits)) * unit(bits) * bits // 8


def pack(codes: jax.Array, bits: int = 4) -> jax.Array:
    """Integers [K, N], of which the lowest bits count, to uint8 [packed_rows(K), N]; zeros after the end."""
    codes = jnp.pad(codes, ((0, -len(codes) % unit(bits)), (0, 0))).astype(jnp.uint8)
    if low := _low(bits):
        N, rows = codes.shape[1], unit(bits)
        parts = pack(codes, low), pack(codes >> low, bits - low)
        of_units = [part.reshape(-1, rows * of // 8, N) for part, of in zip(parts, (low, bits - low), strict=True)]
        return jnp.concatenate(of_units, 1).reshape(-1, N)
    codes = (codes & (1 << bits) - 1).reshape(-1, 8 // bits, codes.shape[1])
    packed = codes[:, 0]
    for i in range(1, 8 // bits):
        packed = packed | codes[:, i] << i * bits
    return packed


def unpack(packed: jax.Array, bits: int = 4) -> jax.Array:
    """Uint8 of whole units of rows to uint8 [K, N], values 0 … 2^bits - 1."""
    N = packed.shape[1]
    if low := _low(bits):
        rows = unit(bits)
        of_units = packed.reshape(-1, rows * bits // 8, N)
        first, others = of_units[:, : rows * low // 8], of_units[:, rows * low // 8 :]
        return unpack(first.reshape(-1, N), low) | unpack(others.reshape(-1, N), bits - low) << low
    shifted = [packed >> first if first else packed for first in range(0, 8, bits)]
    masked = [*(each & (1 << bits) - 1 for each in shifted[:-1]), shifted[-1]]
    return jnp.stack(masked, 1).reshape(-1, N)


def _low(bits: int) -> int:
    """Of the bits, those that are packed by themselves first; 0: all fit into a byte several times."""
    return 0 if 8 % bits == 0 else 4 if bits > 4 else 2


def signed(numbers: jax.Array, bits: int = 4) -> jax.Array:
    """Values 0 … 2^bits - 1 as two's complement of so many bits, int8."""
    if bits == 8:
        return jax.lax.bitcast_convert_type(numbers, jnp.int8)
    half = 1 << bits - 1
    return (numbers ^ half).astype(jnp.int8) - half
