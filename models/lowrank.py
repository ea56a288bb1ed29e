"""A matrix of low rank: the product of a tall one and a wide one."""

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.weights import Weight, grouped, materialize, matmul


class LowRank(Weight):
    """y = (x @ down) @ up. Both factors are matrices like any other: trained, and compressed further, by themselves."""

    def __init__(self, down: nnx.Param, up: nnx.Param):
        """Holds the factors [..., in, rank] and [..., rank, out]."""
        self.down: nnx.Param | Weight = down
        self.up: nnx.Param | Weight = up

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        return (*self.down.shape[:-1], self.up.shape[-1])

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return matmul(matmul(x, self.down), self.up)

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        return grouped(grouped(x, self.down, sizes), self.up, sizes)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return jnp.matmul(materialize(self.down), materialize(self.up), precision=jax.lax.Precision.HIGHEST)
