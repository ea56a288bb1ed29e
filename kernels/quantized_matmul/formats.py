"""Weights of few bits: what they hold, how they are rounded from an array, and what they stand for.

A weight stands for a matrix [K, N] = (in, out). Leaves end in the dimensions named here; more in front (layers of a
scan, experts of a vmap) are the caller's, who maps over them.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

STATIC: Any = {"static": True}


class Format(abc.ABC):
    """What every format is: a frozen dataclass and a pytree, which stands for an array [..., K, N]."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""

    @abc.abstractmethod
    def materialize(self) -> jax.Array:
        """The matrix, float32 [K, N]."""

    def matmul(self, x: jax.Array) -> jax.Array:
        """x [..., K] times the matrix, [..., N] in x's dtype; see `quantized_matmul`."""
        from phyla.kernels.quantized_matmul import quantized_matmul  # which imports this file

        w: Any = self
        return quantized_matmul(x, w)

    @abc.abstractmethod
    def take_columns(self, columns: jax.Array) -> jax.Array:
        """Only the columns of these numbers, integers [M]: float32 [K, M], from no more than their own codes."""

    @property
    def nbytes(self) -> int:
        """Of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Of all leaves: scales count."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels(Format):
    """codes · scale, one scale for each output channel."""

    codes: jax.Array  # [K, N]
    scale: jax.Array  # float32 [N]
    dynamic: bool = dataclasses.field(default=False, metadata=STATIC)
    """Round the activations to the same type, with one scale for each token."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        return self.codes.shape

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        return self.codes.astype(jnp.float32) * self.scale

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        codes, scale = jnp.take(self.codes, columns, axis=-1), jnp.take(self.scale, columns)
        return dataclasses.replace(self, codes=codes, scale=scale).materialize()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Channels):
    """Codes are int8 within ±127. If `dynamic`, the products are exact integers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8(Channels):
    """Codes are float8_e4m3fn: 4 bits of exponent, 3 of mantissa."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(Format):
    """(code - zero) · scale: codes -8 … 7, with a scale and perhaps a zero point for each group of rows of a column.

    Two codes to a byte, the even row in the low half: a TPU kernel reinterprets the bytes as a packed `jnp.int4` of
    twice the rows, whose conversion to int8 is one instruction for 4,096 codes, while arrays of `jnp.int4` take a byte
    per element on a host and on disk.
    """

    codes: jax.Array  # uint8 [ceil(K / 2), N], two's complement
    scale: jax.Array  # floating [ceil(K / group), N]
    zero: jax.Array | None = None  # int8 [ceil(K / group), N]
    rows: int = dataclasses.field(metadata=STATIC)  # K
    group: int = dataclasses.field(metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        return *self.codes.shape[:-2], self.rows, self.codes.shape[-1]

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        codes = signed(unpack(self.codes)[: self.rows]).astype(jnp.float32)
        if self.zero is not None:
            codes = codes - spread(self.zero, self.group, self.rows).astype(jnp.float32)
        return codes * spread(self.scale.astype(jnp.float32), self.group, self.rows)

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, columns, axis=-1), self).materialize()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outliers(Format):
    """A few rows of the matrix exactly, for the columns of x that have outliers, and the others in another format.

    Dettmers et al., LLM.int8() (arXiv 2208.07339), with the rows known beforehand: here x's columns of that number
    are taken out of x before it is rounded. A row number of K or more is padding (where layers are stacked and have
    different numbers of outliers).
    """

    body: Format  # of any other kind; its own values of these rows are not used
    columns: jax.Array  # int32 [O]
    values: jax.Array  # floating [O, N]

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        return self.body.shape

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        return self.body.materialize().at[self.columns].set(self.values.astype(jnp.float32), mode="drop")

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        values = jnp.take(self.values, columns, axis=-1).astype(jnp.float32)
        return self.body.take_columns(columns).at[self.columns].set(values, mode="drop")


def quantize_int8(w: jax.Array, *, dynamic: bool = False) -> Int8:
    """Round w [K, N] to nearest, its columns' largest magnitudes to ±127."""
    codes, scale = round_rows(w.T)
    return Int8(codes=codes.T, scale=scale, dynamic=dynamic)


def quantize_float8(w: jax.Array, *, dynamic: bool = False) -> Float8:
    """Round w [K, N] to nearest, its columns' largest magnitudes to ±448, the largest float8_e4m3fn."""
    codes, scale = round_rows(w.T, jnp.float8_e4m3fn)
    return Float8(codes=codes.T, scale=scale, dynamic=dynamic)


def quantize_int4(w: jax.Array, *, group: int = 128, symmetric: bool = True) -> Int4:
    """Round w [K, N] to nearest in groups of `group` rows (the last may be shorter).

    `symmetric` uses codes -7 … 7; otherwise the range of a group, zero included, goes to -8 … 7 with a zero point.

    Raises:
        ValueError: `group` is odd or not positive.
    """
    if group < 2 or group % 2:
        raise ValueError(f"quantize_int4: group is {group}, expected an even number of rows")
    K, _ = w.shape
    w_GxPxN = blocks(w, group)
    if symmetric:
        scale, zero = nonzero(jnp.abs(w_GxPxN).max(1) / 7), None
    else:
        least, most = jnp.minimum(w_GxPxN.min(1), 0), jnp.maximum(w_GxPxN.max(1), 0)
        scale = nonzero((most - least) / 15)
        zero = (jnp.clip(jnp.round(-least / scale), 0, 15) - 8).astype(jnp.int8)
    offset = 0 if zero is None else zero[:, None].astype(jnp.float32)
    codes = jnp.clip(jnp.round(w_GxPxN / scale[:, None]) + offset, -8, 7).astype(jnp.int8)
    codes = codes.reshape(-1, w.shape[1])[:K]
    return Int4(codes=pack(codes), scale=scale, zero=zero, rows=K, group=group)


def quantize_outliers(w: jax.Array, columns: jax.Array, quantize: Callable[[jax.Array], Format]) -> Outliers:
    """Keep the rows `columns` (int32 [O]) of w [K, N] as they are, and `quantize` the others.

    The rest is scaled as if these rows were zero. LLM.int8() is
    `quantize_outliers(w, columns, functools.partial(quantize_int8, dynamic=True))`.
    """
    values = w.at[columns].get(mode="fill", fill_value=0)
    return Outliers(body=quantize(w.at[columns].set(0, mode="drop")), columns=columns, values=values)


def round_rows(x: jax.Array, dtype: Any = jnp.int8) -> tuple[jax.Array, jax.Array]:
    """Round x [..., K] to `dtype` (int8 or float8_e4m3fn), its last dimension's largest magnitude to the largest code.

    Returns codes [..., K] and scales, float32 [...], with codes · scale ≈ x. Nothing finite gives NaN; a row with a NaN
    has the scale NaN.
    """
    most = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = nonzero(jnp.abs(x).max(-1) / most)
    codes = x / scale[..., None]
    if dtype == jnp.int8:
        codes = jnp.round(codes)
    return jnp.clip(codes, -most, most).astype(dtype), scale


def rounded_like_weights(x: jax.Array, w: Format) -> jax.Array:
    """x as a dynamic `w` multiplies it, float32; x itself if `w` is not dynamic."""
    if not (isinstance(w, Channels) and w.dynamic):
        return x
    codes, scale = round_rows(x, w.codes.dtype)
    return codes.astype(jnp.float32) * scale[..., None]


def nonzero(scale: jax.Array) -> jax.Array:
    """1 where the scale is zero or too small to divide by: all codes are then 0."""
    return jnp.where(scale < 1e-30, 1.0, scale)


def pack(codes: jax.Array) -> jax.Array:
    """Integers [K, N] of four bits to uint8 [ceil(K / 2), N], the even row in the low half."""
    codes = jnp.pad(codes, ((0, codes.shape[0] % 2), (0, 0))).astype(jnp.uint8) & 15
    return codes[::2] | codes[1::2] << 4


def unpack(packed: jax.Array) -> jax.Array:
    """Uint8 [K / 2, N] to uint8 [K, N], values 0 … 15."""
    return jnp.stack([packed & 15, packed >> 4], 1).reshape(-1, packed.shape[1])


def signed(nibbles: jax.Array) -> jax.Array:
    """Values 0 … 15 as two's complement of four bits, int8."""
    return (nibbles ^ 8).astype(jnp.int8) - 8


def blocks(w: jax.Array, size: int) -> jax.Array:
    """[K, N] to float32 [ceil(K / size), size, N], zeros after the end."""
    K, N = w.shape
    return jnp.pad(w.astype(jnp.float32), ((0, -K % size), (0, 0))).reshape(-1, size, N)


def spread(of_groups: jax.Array, group: int, rows: int) -> jax.Array:
    """[G, N] to [rows, N], each repeated for the rows of its group."""
    G, N = of_groups.shape
    return jnp.broadcast_to(of_groups[:, None], (G, group, N)).reshape(-1, N)[:rows]


quantize_llm_int8 = functools.partial(quantize_outliers, quantize=functools.partial(quantize_int8, dynamic=True))
"""LLM.int8(): `quantize_llm_int8(w_KxN, columns_O)`."""
