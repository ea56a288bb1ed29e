"""Integers of 2, 3, 4 or 8 bits with a scale, and perhaps a zero point, for each group of rows of a column."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phyla.kernels.quantized_matmul.formats import STATIC, Format, blocks, nonzero, spread, take_last
from phyla.kernels.quantized_matmul.packing import pack, signed, unit, unpack

RATIOS = 40
"""Of the range of a group, tried for the least squared error: 1, 0.98, … 0.22."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes(Format):
    """(code - zero) · scale: two's complement, with a scale and perhaps a zero point for each group or for all.

    Several codes to a byte, as `packing` says.
    """

    codes: jax.Array  # uint8 [packed_rows(K), N]
    scale: jax.Array  # floating [ceil(K / group), N] or []
    zero: jax.Array | None = None  # int8, as the scale
    rows: int = dataclasses.field(metadata=STATIC)  # K
    group: int = dataclasses.field(metadata=STATIC)
    bits: ClassVar[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        return *self.codes.shape[:-2], self.rows, self.codes.shape[-1]

    def scales(self) -> jax.Array:
        """Of the groups, float32 [ceil(K / group), N]."""
        return self.of_groups(self.scale)

    def of_groups(self, scale_or_zero: jax.Array) -> jax.Array:
        """One of them for each group, float32 [ceil(K / group), N], also where the whole matrix shares one."""
        groups = -(-self.rows // self.group)
        return jnp.broadcast_to(scale_or_zero.astype(jnp.float32), (groups, self.codes.shape[-1]))

    def steps(self) -> jax.Array:
        """The scale of every element, float32 [K, N]."""
        return spread(self.scales(), self.group, self.rows)

    def zeros(self) -> jax.Array:
        """The code that stands for 0, of every element: float32 [K, N]."""
        if self.zero is None:
            return jnp.zeros((self.rows, self.codes.shape[-1]))
        return spread(self.of_groups(self.zero), self.group, self.rows)

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        codes = signed(unpack(self.codes, self.bits)[: self.rows], self.bits).astype(jnp.float32)
        return (codes if self.zero is None else codes - self.zeros()) * self.steps()

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        return take_last(self, columns).materialize()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Groups(Codes):
    """-128 … 127. `Int8` is the simpler one, of a scale for each column or for all."""

    bits: ClassVar[int] = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(Codes):
    """-8 … 7.

    A TPU kernel reinterprets the bytes as a packed `jnp.int4` of twice the rows, whose conversion to int8 is one
    instruction for 4,096 codes, while arrays of `jnp.int4` take a byte per element on a host and on disk.
    """

    bits: ClassVar[int] = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int3(Codes):
    """-4 … 3."""

    bits: ClassVar[int] = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int2(Codes):
    """-2 … 1; symmetric, the scale is the largest magnitude of a group: -1, 0, 1."""

    bits: ClassVar[int] = 2


KINDS = {kind.bits: kind for kind in (Int8Groups, Int4, Int3, Int2)}
"""By their bits."""


def quantize_codes(
    w: jax.Array,
    *,
    bits: int,
    group: int | None = 128,
    symmetric: bool = True,
    least_squares: bool = False,
    tensor: bool = False,
) -> Any:
    """Round w [K, N] to nearest in groups of `group` rows (the last may be shorter).

    Args:
        w: the matrix.
        bits: of a code: 2, 3, 4 or 8.
        group: rows that share a scale; None: all of a column.
        symmetric: the largest magnitude goes to the largest code (of four bits ±7); otherwise the range of a group,
            zero included, to all codes, with a zero point.
        least_squares: of the clipped ranges r · range, r = 1, 0.98, … 0.22, that of the least squared error in the
            group; else 1. What lies outside goes to the outermost code.
        tensor: one scale for the whole matrix.

    Returns:
        The `Codes` of so many bits.

    Raises:
        ValueError: `group` rows are not whole bytes.
    """
    kind, rows = KINDS[bits], unit(bits)
    K, N = w.shape
    group = group or K + -K % rows
    if group < rows or group % rows:
        raise ValueError(f"quantize_int{bits}: group is {group}, expected a multiple of {rows} rows")
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1
    w_GxPxN = blocks(w, group)
    axes = None if tensor else 1
    low, high = (edge(w_GxPxN, axes, keepdims=True) for edge in (jnp.min, jnp.max))
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)

    def grid(ratio: jax.Array | float) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point of a part of the range."""
        if symmetric:
            return nonzero(ratio * jnp.maximum(-low, high) / most), jnp.zeros_like(low)
        scale = nonzero(ratio * (high - low) / (most - least))
        return scale, jnp.clip(jnp.round(-ratio * low / scale), 0, most - least) + least

    def rounded(scale: jax.Array, zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(w_GxPxN / scale) + zero, least, most)

    def better(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ratio = 1 - i / 50
        scale, zero = grid(ratio)
        error = jnp.square((rounded(scale, zero) - zero) * scale - w_GxPxN).sum(axes, keepdims=True)
        less = error < found[1]
        return jnp.where(less, ratio, found[0]), jnp.where(less, error, found[1])

    ratio = 1.0
    if least_squares:
        ratio, _ = jax.lax.fori_loop(0, RATIOS, better, (jnp.ones_like(low), jnp.full_like(low, jnp.inf)))
    scale, zero = grid(ratio)
    codes = rounded(scale, zero).astype(jnp.int8).reshape(-1, N)[:K]
    of_all = lambda a: a.reshape(()) if tensor else a[:, 0]  # noqa: E731
    return kind(
        codes=pack(codes, bits),
        scale=of_all(scale),
        zero=None if symmetric else of_all(zero).astype(jnp.int8),
        rows=K,
        group=group,
    )


quantize_int4 = functools.partial(quantize_codes, bits=4)
quantize_int3 = functools.partial(quantize_codes, bits=3)
quantize_int2 = functools.partial(quantize_codes, bits=2)


def quantize_ternary(w: jax.Array) -> Int2:
    """Round w [K, N] / γ to nearest of -1, 0 and 1, with γ = ⟨|w|⟩ of the whole matrix.

    BitNet b1.58: Ma et al. 2024 (arXiv 2402.17764, equations 1 to 3).
    """
    scale, rows = nonzero(_total(jnp.abs(w.astype(jnp.float32))) / w.size), unit(2)
    codes = jnp.clip(jnp.round(w / scale), -1, 1).astype(jnp.int8)
    return Int2(codes=pack(codes, 2), scale=scale, rows=len(w), group=len(w) + -len(w) % rows)


def _total(x: jax.Array) -> jax.Array:
    """Σ x, the same to the bit in every program: halves are added to halves, and no compiler changes that order."""
    while x.ndim:
        if len(x) == 1:
            x = x[0]
        else:
            halves = jnp.pad(x, ((0, len(x) % 2), *((0, 0),) * (x.ndim - 1))).reshape(2, -1, *x.shape[1:])
            x = halves[0] + halves[1]
    return x
