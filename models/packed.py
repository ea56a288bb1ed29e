"""A matrix of which N of every M consecutive inputs of an output are not zero: these values and their places."""

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.quantized_matmul.packing import pack, packed_rows, unpack
from phyla.models.quantized import Fixed
from phyla.models.weights import Weight, dense_matmul, take

COLUMNS = 256
"""Outputs whose part of the matrix is dense at a time."""


class Packed(Weight):
    """Values, with their places in their groups in as few bits as these take.

    The values are a table of the outputs' [out, kept]: trained, and compressed further, by themselves.
    """

    def __init__(self, values: nnx.Param, places: jax.Array, axes: tuple[str, ...], rows: int, keep: int, group: int):
        """Holds values [..., out, kept] and packed places, uint8 [..., bytes, out]; see `pack_groups`.

        Args:
            values: the values.
            places: their places.
            axes: logical names of the dimensions of the matrix, with those in front.
            rows: inputs.
            keep: N of N:M.
            group: M.
        """
        self.values: nnx.Param | Weight = values
        self.places = Fixed(places, axes=(*axes[:-2], "kept", axes[-1]))
        self.rows, self.keep, self.group = rows, keep, group

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        *stack, N, _ = self.values.shape
        return (*stack, self.rows, N)

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        N = self.shape[-1]
        size = min(COLUMNS, N)
        whole, left = divmod(N, size)

        def part(start: jax.Array | int, count: int) -> jax.Array:
            return dense_matmul(x, self._columns(start, count))

        some = jax.checkpoint(lambda i: part(i * size, size))  # else its gradient would keep every part
        y_CxSxN = jax.lax.map(some, jnp.arange(whole))
        y = jnp.moveaxis(y_CxSxN, 0, -2).reshape(*x.shape[:-1], whole * size)
        return jnp.concatenate([y, part(whole * size, left)], -1) if left else y

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return self._columns(0, self.shape[-1])

    def _columns(self, start: jax.Array | int, count: int) -> jax.Array:
        """Outputs from a start, float32 [in, count]."""
        groups = -(-self.rows // self.group)
        values_CxR = take(self.values, start + jnp.arange(count))
        values_GxNx1xC = values_CxR.T.reshape(groups, self.keep, 1, count)
        packed = jax.lax.dynamic_slice_in_dim(self.places[...], start, count, axis=1)
        places_RxC = unpack(packed, place_bits(self.group))[: groups * self.keep]
        places_GxNx1xC = places_RxC.reshape(groups, self.keep, 1, count)
        chosen = places_GxNx1xC == jnp.arange(self.group, dtype=jnp.uint8)[:, None]
        return jnp.where(chosen, values_GxNx1xC, 0).sum(1).reshape(-1, count)[: self.rows]


def place_bits(group: int) -> int:
    """Of a place in a group."""
    return max(1, (group - 1).bit_length())


def packed_bits(rows: int, keep: int, group: int, bits: int = 32) -> int:
    """Of a column packed, with values of so many bits."""
    kept = -(-rows // group) * keep
    return kept * bits + 8 * packed_rows(kept, place_bits(group))


def pack_groups(w: jax.Array, keep: int, group: int) -> tuple[jax.Array, jax.Array]:
    """The values [N, kept] and packed places of w [K, N], which has at most `keep` in a group that are not zero."""
    K, N = w.shape
    w_GxMxN = jnp.pad(w, ((0, -K % group), (0, 0))).reshape(-1, group, N)
    places_GxKxN = jnp.sort(jnp.argsort(w_GxMxN == 0, axis=1)[:, :keep], axis=1)
    values = jnp.take_along_axis(w_GxMxN, places_GxKxN, axis=1)
    return values.reshape(-1, N).T, pack(places_GxKxN.reshape(-1, N), place_bits(group))
