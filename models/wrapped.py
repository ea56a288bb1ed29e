"""Matrices that do something to what they multiply first: y = f(x) body.

They wrap the parameter, or another `Weight`, that holds the rest: so they work in every architecture, whatever comes
before the matrix (a norm, a gate, a recurrence, a token shift), compose, and leave `body` to be rounded, pruned or
wrapped again. What it costs is f, for every input of every token.
"""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phyla.models.quantized import Fixed
from phyla.models.weights import Weight, group_of_rows, grouped, materialize, matmul


class Wrapped(Weight):
    """y = f(x) body, where f knows one array besides x."""

    def __init__(self, body: nnx.Param | Weight, own: jax.Array, axes: tuple[str, ...]):
        """Wraps a matrix.

        Args:
            body: [..., in, out].
            own: what f knows; stacked as the body is.
            axes: logical names of its dimensions.
        """
        self.body = body
        self.own = Fixed(own, axes=axes)

    @staticmethod
    @abc.abstractmethod
    def of_input(x: jax.Array, own: jax.Array) -> jax.Array:
        """f: [..., in] to the same, float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        return self.body.shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return matmul(self.of_input(x, self.own[...]).astype(x.dtype), self.body)

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        own = jnp.take(self.own[...], group_of_rows(sizes, len(x)), axis=0, mode="clip")
        return grouped(jax.vmap(self.of_input)(x, own).astype(x.dtype), self.body, sizes)


class Scaled(Wrapped):
    """Every input times its own scale: y = (x · own) body, float32 own [..., in]."""

    @staticmethod
    def of_input(x: jax.Array, own: jax.Array) -> jax.Array:
        """See `Wrapped.of_input`."""
        return x.astype(jnp.float32) * own

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return self.own[...][:, None] * materialize(self.body)


class Rounded(Wrapped):
    """Inputs rounded to 8 bits, with one scale for all of them known beforehand: float32 own [...].

    The derivative counts the rounding as the identity. The matrix that it stands for is the body.
    """

    @staticmethod
    def of_input(x: jax.Array, own: jax.Array) -> jax.Array:
        """See `Wrapped.of_input`."""
        x = x.astype(jnp.float32)
        return x + jax.lax.stop_gradient(jnp.clip(jnp.round(x / own), -127, 127) * own - x)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return materialize(self.body)


class Rotated(Wrapped):
    """y = (x Q) body with body = Qᵀ W, for an orthogonal Q that spreads each input over all: an outlier is one no more.

    Q = diag(own) (C ⊗ H): random signs, int8 own [..., in], and for in = m 2^n with m odd a Hadamard matrix H of 2^n
    (as n passes of sums and differences) and the orthonormal cosine transform C of m, both scaled to be orthogonal. C
    is the product ⊗ of the transforms of m's prime factors if m is more than `MOST_ODD`.
    QuaRot (Ashkboos et al. 2024, arXiv 2404.00456); for Mamba, Quamba (Chiang et al. 2024, arXiv 2410.13229).
    """

    MOST_ODD: ClassVar[int] = 64
    """The largest transform that is worth it: it is multiplied as a dense matrix."""

    @staticmethod
    def of_input(x: jax.Array, own: jax.Array) -> jax.Array:
        """See `Wrapped.of_input`."""
        return _mixed(x.astype(jnp.float32) * own)

    @classmethod
    def turned(cls, w: jax.Array, own: jax.Array) -> jax.Array:
        """Qᵀ w for w [in, out]."""
        return cls.of_input(w.T, own).T

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return _mixed(materialize(self.body).T, back=True).T * self.own[...][:, None]


def odd_factors(size: int) -> tuple[int, ...]:
    """Of what is odd of a number, if that is not 1: itself if it is at most `Rotated.MOST_ODD`, else its primes."""
    rest, factors, divisor = size // (size & -size), [], 3
    if rest <= Rotated.MOST_ODD:
        return (rest,) * (rest > 1)
    while divisor**2 <= rest:
        if rest % divisor:
            divisor += 2
        else:
            factors, rest = [*factors, divisor], rest // divisor
    return (*factors, rest)


def _mixed(x: jax.Array, *, back: bool = False) -> jax.Array:
    """x (C ⊗ H), or by its transpose."""
    mixed, rest = x, x.shape[-1]
    for factor in odd_factors(rest):
        C, rest = _cosines(factor), rest // factor
        x_NxMxP = mixed.reshape(-1, factor, rest)
        precision = jax.lax.Precision.HIGHEST
        mixed = jnp.einsum("nmp,ml->nlp", x_NxMxP, C.T if back else C, precision=precision)
    return hadamard(mixed.reshape(-1, rest)).reshape(x.shape)


def hadamard(x: jax.Array) -> jax.Array:
    """x [..., 2^n] times Sylvester's Hadamard matrix / 2^(n/2), which is orthogonal, in n passes."""
    size = half = x.shape[-1]
    turned = x
    while half > 1:
        half //= 2
        pairs = turned.reshape(-1, 2, half)
        turned = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
    return turned.reshape(x.shape) * size**-0.5


def _cosines(size: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II) [size, size]; no element is larger than √(2 / size)."""
    k, n = np.arange(size)[:, None], np.arange(size)
    found = np.sqrt(2 / size) * np.cos(np.pi * (n + 0.5) * k / size)
    found[0] = np.sqrt(1 / size)
    return found.astype(np.float32)
