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
    """codes · scale, one scale for each output channel or for the whole matrix."""

    codes: jax.Array  # [K, N]
    scale: jax.Array  # float32 [N] or []
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
        return take_last(self, columns).materialize()


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


def quantize_int8(w: jax.Array, *, dynamic: bool = False, tensor: bool = False) -> Int8:
    """Round w [K, N] to nearest, its columns' (of a `tensor`, all its) largest magnitudes to ±127."""
    codes, scale = _round(w, jnp.int8, tensor)
    return Int8(codes=codes, scale=scale, dynamic=dynamic)


def quantize_float8(w: jax.Array, *, dynamic: bool = False, tensor: bool = False) -> Float8:
    """Round w [K, N] to nearest, its columns' (of a `tensor`, all its) largest magnitudes to ±448, the largest code."""
    codes, scale = _round(w, jnp.float8_e4m3fn, tensor)
    return Float8(codes=codes, scale=scale, dynamic=dynamic)


def _round(w: jax.Array, dtype: Any, tensor: bool) -> tuple[jax.Array, jax.Array]:
    codes, scale = round_rows(w.ravel() if tensor else w.T, dtype)
    return codes.reshape(w.shape) if tensor else codes.T, scale


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
    scale = nonzero(jnp.abs(x).max(-1) * (1 / most))  # compilers may divide by a constant like this or truly
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


def take_last[W: Format](w: W, columns: jax.Array) -> W:
    """The columns of these numbers of every leaf but those of the whole matrix."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, columns, axis=-1) if leaf.ndim else leaf, w)


def nonzero(scale: jax.Array) -> jax.Array:
    """1 where the scale is zero or too small to divide by: all codes are then 0."""
    return jnp.where(scale < 1e-30, 1.0, scale)


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
