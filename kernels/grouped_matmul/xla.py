"""Grouped matmul for XLA on CPUs: a loop over the groups, and in each over tiles of its rows.

A tile is one dense product of a static shape; how many there are is known only at run time. The last tile of a group
has the least of `REST` static sizes that holds what is left, so that about STEP / 2 rows of a group are wasted, and
its surplus rows are masked. One group's matrix is sliced once and then used for all its tiles.
"""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align

TILE, STEP = 128, 32


def product(x, weight, sizes, *, transpose=False):
    """See `grouped_matmul`; by the transposed matrices if `transpose`."""
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(y_NxO, parts):
        weight_IxO, end, size = parts

        def tile(y_NxO, start, rows):
            at, members_M = _tile(x, start, end, rows)
            x_MxI = jax.lax.dynamic_slice_in_dim(x, at, rows)
            new_MxO = jax.lax.dot_general(x_MxI, weight_IxO, contract, preferred_element_type=jnp.float32)
            old_MxO = jax.lax.dynamic_slice_in_dim(y_NxO, at, rows)
            new_MxO = jnp.where(members_M[:, None], new_MxO.astype(x.dtype), old_MxO)
            return jax.lax.dynamic_update_slice_in_dim(y_NxO, new_MxO, at, 0)

        return _tiles(tile, y_NxO, end - size, size, len(x)), None

    y_NxO = jnp.zeros((len(x), weight.shape[1 if transpose else 2]), x.dtype)
    return jax.lax.scan(group, align(y_NxO, x)[0], (weight, jnp.cumsum(sizes), sizes))[0]


def weight_gradient(x, g, sizes):
    """xᵀ g over the rows of each group, float32 [E, I, O]."""

    def group(_, parts):
        end, size = parts

        def tile(sum_IxO, start, rows):
            at, members_M = _tile(x, start, end, rows)
            x_MxI = jnp.where(members_M[:, None], jax.lax.dynamic_slice_in_dim(x, at, rows), 0)
            g_MxO = jax.lax.dynamic_slice_in_dim(g, at, rows)
            return sum_IxO + jnp.matmul(x_MxI.T, g_MxO, preferred_element_type=jnp.float32)

        zeros_IxO = align(jnp.zeros((x.shape[1], g.shape[1])), x)[0]
        return None, _tiles(tile, zeros_IxO, end - size, size, len(x))

    return jax.lax.scan(group, None, (jnp.cumsum(sizes), sizes))[1]


def _tiles(tile, carry, start, size, N):
    """`carry = tile(carry, start of the tile, its rows)` over tiles that cover `size` rows from `start`."""
    whole = size // TILE
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: tile(carry, start + i * TILE, min(TILE, N)), carry)
    start, rest = start + whole * TILE, size - whole * TILE
    choices = [min(rows, N) for rows in range(STEP, min(TILE, N) + STEP, STEP)]
    last = [lambda carry, rows=rows: tile(carry, start, rows) for rows in choices]
    return jax.lax.switch((rest + STEP - 1) // STEP, [lambda carry: carry, *last], carry)


def _tile(x, start, end, rows):
    """Where a tile is cut, and which of its rows belong to it: near the end of x it reaches back."""
    at = jnp.minimum(start, len(x) - rows)
    rows_M = at + jnp.arange(rows)
    return at, (rows_M >= start) & (rows_M < end)
