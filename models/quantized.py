"""A matrix in few bits: one of the formats of `phyla.kernels.quantized_matmul` as a `Weight`."""

import jax
from flax import nnx

from phyla.kernels.quantized_matmul import Format, quantized_matmul
from phyla.models.weights import Weight, dense_matmul


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
            if name in ("scale_scales", "book"):  # by position, not by column
                own = (name,)
            setattr(self, name, Fixed(leaf, axes=axes[:stack] + own))

    @property
    def held(self) -> Format:
        """The format."""
        return jax.tree.unflatten(self.structure, [getattr(self, name)[...] for name in self.names])

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

    def take(self, rows: jax.Array) -> jax.Array:
        """See `Weight.take`."""
        if not self.transposed:
            return super().take(rows)
        return self.held.take_columns(rows.ravel()).T.reshape(*rows.shape, -1)

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul_transposed`."""
        return quantized_matmul(x.astype("float32"), self.held) if self.transposed else super().matmul_transposed(x)
