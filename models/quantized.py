"""A matrix in few bits: one of the formats of `phyla.kernels.quantized_matmul` as a `Weight`."""

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.grouped_matmul import grouped_matmul
from phyla.kernels.quantized_matmul import Format, Outliers, quantized_matmul
from phyla.kernels.quantized_matmul.formats import rounded_like_weights
from phyla.models.weights import Weight, dense_matmul, group_of_rows, materialize


class Fixed(nnx.Variable):
    """A part of a compressed weight: saved and restored like a parameter, and never trained."""


class Quantized(Weight):
    """The matrix that a format stands for, or several of them, stacked.

    Every leaf of the format is a variable of its name. Differentiable in x alone.
    """

    def __init__(self, held: Format, axes: tuple[str, ...], *, transposed: bool = False):
        """Holds a format.

        Args:
            held: its leaves may have dimensions in front, in which case there are that many matrices.
            axes: logical names of the dimensions of the format's matrix, with those in front.
            transposed: stands for the transposed matrix. A table of vectors is held so: its vectors, the columns of the
                format, have scales of their own, and are looked up one by one.
        """
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(held)
        self.names = tuple(jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves)
        self.transposed = transposed
        stack = len(axes) - 2
        for name, (_, leaf) in zip(self.names, leaves, strict=True):
            own = {0: (), 1: axes[-1:], 2: axes[-2:]}[leaf.ndim - stack]
            if name == "blocks":  # of a GGUF file, where the outputs are the rows
                own = own[::-1]
            # By position, not by column; by outlier, not by row.
            own = {
                "scale_scales": ("scales",),
                "book": ("book",),
                "columns": ("outliers",),
                "values": ("outliers", axes[-1]),
            }.get(name, own)
            setattr(self, name, Fixed(leaf, axes=axes[:stack] + own))

    @property
    def held(self) -> Format:
        """The format; of shapes, where the model has shapes in place of arrays."""
        return jax.tree.unflatten(self.structure, [getattr(self, name).get_value() for name in self.names])

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        *stack, K, N = self.held.shape
        return (*stack, N, K) if self.transposed else (*stack, K, N)

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return dense_matmul(x, self.materialize()) if self.transposed else quantized_matmul(x, self.held)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        dense = self.held.materialize()
        return dense.T if self.transposed else dense

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`; x is rounded where `matmul` rounds it."""
        held = self.held
        if isinstance(held, Outliers):
            columns = jnp.take(held.columns, group_of_rows(sizes, len(x)), axis=0, mode="clip")
            outer = jnp.any(columns[..., None] == jnp.arange(x.shape[-1]), axis=1)
            inner = rounded_like_weights(jnp.where(outer, 0, x), held.body).astype(x.dtype)
            return grouped_matmul(jnp.where(outer, x, inner), materialize(self), sizes)
        return grouped_matmul(rounded_like_weights(x, held).astype(x.dtype), materialize(self), sizes)

    def take(self, rows: jax.Array) -> jax.Array:
        """See `Weight.take`."""
        if not self.transposed:
            return super().take(rows)
        return self.held.take_columns(rows.ravel()).T.reshape(*rows.shape, -1)

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul_transposed`."""
        return quantized_matmul(x.astype("float32"), self.held) if self.transposed else super().matmul_transposed(x)
