"""What is learned beside a weight that stays as it is: LoRA and its kin, IA3, bottlenecks.

An `Adapter` is a `Weight` around a parameter or another `Weight`: so it works in every architecture, in experts, in
tables, under scans, and over weights of few bits, which are never made dense. What it learns are parameters of its own;
what it wraps gets no gradient if it is frozen (`phyla.models.weights.freeze`).
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.grouped_matmul import grouped_matmul
from phyla.models.quantized import Fixed
from phyla.models.weights import (
    Weight,
    dense_matmul,
    group_of_rows,
    grouped,
    materialize,
    matmul,
    matmul_transposed,
    take,
)


class Adapter(Weight):
    """See above."""

    linear: ClassVar[bool] = True
    """Whether it stands for a matrix, so that it can be merged with what it wraps."""

    def __init__(self, body: nnx.Param | Weight):
        """Wraps a matrix [..., in, out]."""
        self.body = body

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        return self.body.shape


class LoRA(Adapter):
    """W + scale · A B, with A [in, r] and B [r, out] (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

    def __init__(self, body: nnx.Param | Weight, A: nnx.Param, B: nnx.Param, scale: float):
        """A and B are stacked as the body is; `scale` is α / r, or another function of both."""
        super().__init__(body)
        self.A, self.B, self.scale = A, B, scale

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Of what is added, without the scale: [..., in, r'] and [..., r', out]."""
        return self.A[...], self.B[...]

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        A, B = self.factors()
        return matmul(x, self.body) + self.scale * dense_matmul(dense_matmul(x, A), B)

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        A, B = self.factors()
        return grouped(x, self.body, sizes) + self.scale * grouped_matmul(grouped_matmul(x, A, sizes), B, sizes)

    def take(self, rows: jax.Array) -> jax.Array:
        """See `Weight.take`."""
        A, B = self.factors()
        return take(self.body, rows) + self.scale * (jnp.take(A, rows, axis=0) @ B)

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul_transposed`."""
        A, B = (factor.astype(x.dtype) for factor in self.factors())
        added = jnp.matmul(x @ B.T, A.T, preferred_element_type=jnp.float32)
        return matmul_transposed(x, self.body) + self.scale * added

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        A, B = self.factors()
        return materialize(self.body) + self.scale * jnp.matmul(A, B, precision=jax.lax.Precision.HIGHEST)


class PiSSA(LoRA):
    """W + scale · (A B - A₀ B₀): LoRA that begins at scale · A₀ B₀, the r largest singular directions of W.

    Meng et al. 2024, arXiv 2404.02948, who subtract the beginning from the base; here the base stays as it is.
    """

    def __init__(self, body: nnx.Param | Weight, A: nnx.Param, B: nnx.Param, scale: float):
        """A₀ and B₀ are A and B as they are now."""
        super().__init__(body, A, B, scale)
        self.A0 = Fixed(A[...], axes=A.get_metadata()["axes"])
        self.B0 = Fixed(B[...], axes=B.get_metadata()["axes"])

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """See `LoRA.factors`."""
        A = jnp.concatenate([self.A[...], self.A0[...]], axis=-1)
        return A, jnp.concatenate([self.B[...], -self.B0[...]], axis=-2)


class DoRA(LoRA):
    """Each column of W + scale · A B, made 1 long, times a learned magnitude (Liu et al. 2024, arXiv 2402.09353).

    The norm counts as a constant in the derivative (their section 4.3). It comes from that of W's column, which does
    not change, and products of A and B, so that no dense matrix is made.
    """

    def __init__(
        self, body: nnx.Param | Weight, A: nnx.Param, B: nnx.Param, scale: float, magnitude: nnx.Param, norm: jax.Array
    ):
        """`norm` [..., out] is of the body's columns."""
        super().__init__(body, A, B, scale)
        self.magnitude = magnitude
        self.norm = Fixed(norm, axes=magnitude.get_metadata()["axes"])

    def _factor(self) -> jax.Array:
        """Magnitude over norm, [out]."""
        A, B = self.factors()
        highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        crossed = jnp.sum(matmul(A.T, self.body) * B, axis=0)
        square = jnp.square(self.norm[...]) + self.scale * (
            2 * crossed + self.scale * jnp.sum(highest(highest(A.T, A), B) * B, axis=0)
        )
        return self.magnitude[...] * jax.lax.rsqrt(jnp.maximum(jax.lax.stop_gradient(square), 1e-24))

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return super().matmul(x) * self._factor().astype(x.dtype)

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        factor_ExO = jax.vmap(DoRA._factor)(self)
        factor_NxO = jnp.take(factor_ExO, group_of_rows(sizes, len(x)), axis=0, mode="clip")
        return super().grouped_matmul(x, sizes) * factor_NxO.astype(x.dtype)

    def take(self, rows: jax.Array) -> jax.Array:
        """See `Weight.take`."""
        return super().take(rows) * self._factor()

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul_transposed`."""
        return super().matmul_transposed(x * self._factor().astype(x.dtype))

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return super().materialize() * self._factor()


class IA3(Adapter):
    """Every input or output of W times its own learned scale (Liu et al. 2022, arXiv 2205.05638, section 3.3)."""

    def __init__(self, body: nnx.Param | Weight, factor: nnx.Param, *, inputs: bool):
        """`factor` is [..., in] if it is of the inputs, else [..., out]."""
        super().__init__(body)
        self.factor, self.inputs = factor, inputs

    def _on(self, inputs: bool, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
        if inputs != self.inputs:
            return x
        return x * (self.factor[...] if factor is None else factor).astype(x.dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return self._on(False, matmul(self._on(True, x), self.body))

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        factor = jnp.take(self.factor[...], group_of_rows(sizes, len(x)), axis=0, mode="clip")
        return self._on(False, grouped(self._on(True, x, factor), self.body, sizes), factor)

    def take(self, rows: jax.Array) -> jax.Array:
        """See `Weight.take`."""
        found = take(self.body, rows)
        return found * (jnp.take(self.factor[...], rows)[..., None] if self.inputs else self.factor[...])

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul_transposed`."""
        return self._on(True, matmul_transposed(self._on(False, x), self.body))

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        factor = self.factor[...]
        return materialize(self.body) * (factor[:, None] if self.inputs else factor)


class Bottleneck(Adapter):
    """y + up(activation(down(y))) after y = x W: it changes what a block adds (Houlsby et al. 2019, arXiv 1902.00751).

    It is no matrix; the one that it stands for, to be counted, is the body.
    """

    linear: ClassVar[bool] = False

    def __init__(
        self,
        body: nnx.Param | Weight,
        down: nnx.Param,
        up: nnx.Param,
        activation: Callable[[jax.Array], jax.Array],
    ):
        """`down` is [..., out, r] and `up` [..., r, out]."""
        super().__init__(body)
        self.down, self.up, self.activation = down, up, activation

    def _after(self, y: jax.Array, multiply: Callable[..., jax.Array], *sizes: Any) -> jax.Array:
        hidden = self.activation(multiply(y, self.down[...], *sizes))
        return y + multiply(hidden, self.up[...], *sizes)

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return self._after(matmul(x, self.body), dense_matmul)

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        return self._after(grouped(x, self.body, sizes), grouped_matmul, sizes)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return materialize(self.body)
