"""Grouped matmul for XLA on CPUs: a loop over the groups, and in each over tiles of its rows.

A tile is one dense product of a static shape; how many there are is known only at run time. The last tile of a group
has the least of the static sizes STEP, 2 STEP, … TILE that holds what is left, so that about STEP / 2 rows of a group
are wasted, and its surplus rows are masked. One group's matrix is sliced once and then used for all its tiles.
"""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align

TILE, STEP = 256, 32


def product(x, weight, sizes, *, transpose=False):
    """See `grouped_matmul`; by the transposed matrices if `transpose`."""
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(y_NxO, parts):
        weight_IxO, end, size = parts

        def tile(y_NxO, start, rows):
            at, members_M = _cut(x, start, end, rows)
            x_MxI = jax.lax.dynamic_slice_in_dim(x, at, rows)
            new_MxO = jax.lax.dot_general(x_MxI, weight_IxO, contract, preferred_element_type=jnp.float32)
            old_MxO = jax.lax.dynamic_slice_in_dim(y_NxO, at, rows)
            new_MxO = jnp.where(members_M[:, None], new_MxO.astype(x.dtype), old_MxO)
            return jax.lax.dynamic_update_slice_in_dim(y_NxO, new_MxO, at, 0)

        last = _last_tile(lambda start, rows: tile(y_NxO, start, rows), lambda: y_NxO, end, size, len(x))
        return _whole_tiles(tile, last, end - size, size, len(x)), None

    y_NxO = jnp.zeros((len(x), weight.shape[1 if transpose else 2]), x.dtype)
    return jax.lax.scan(group, align(y_NxO, x)[0], (weight, jnp.cumsum(sizes), sizes))[0]


def weight_gradient(x, g, sizes):
    """xᵀ g over the rows of each group, float32 [E, I, O]."""

    def group(_, parts):
        end, size = parts

        def tile(start, rows):
            at, members_M = _cut(x, start, end, rows)
            x_MxI = jnp.where(members_M[:, None], jax.lax.dynamic_slice_in_dim(x, at, rows), 0)
            g_MxO = jax.lax.dynamic_slice_in_dim(g, at, rows)
            return jnp.matmul(x_MxI.T, g_MxO, preferred_element_type=jnp.float32)

        def nothing():
            return align(jnp.zeros((x.shape[1], g.shape[1])), x)[0]

        # The last tile first: the gradient of a group of one tile is its product, and no sum.
        last_IxO = _last_tile(tile, nothing, end, size, len(x))
        add = lambda sum_IxO, start, rows: sum_IxO + tile(start, rows)  # noqa: E731
        return None, _whole_tiles(add, last_IxO, end - size, size, len(x))

    return jax.lax.scan(group, None, (jnp.cumsum(sizes), sizes))[1]


def _whole_tiles(tile, carry, start, size, N):
    """`carry = tile(carry, start of the tile, its rows)` over the whole tiles in `size` rows from `start`."""
    return jax.lax.fori_loop(0, size // TILE, lambda i, carry: tile(carry, start + i * TILE, min(TILE, N)), carry)


def _last_tile(tile, nothing, end, size, N):
    """`tile(its start, its rows)` of what whole tiles leave of `size` rows before `end`, or `nothing()`."""
    left = size % TILE
    choices = [min(rows, N) for rows in range(STEP, min(TILE, N) + STEP, STEP)]
    branches = [lambda rows=rows: tile(end - left, rows) for rows in choices]
    return jax.lax.switch((left + STEP - 1) // STEP, [nothing, *branches])


def _cut(x, start, end, rows):
    """Where a tile is cut, and which of its rows belong to it: near the end of x it reaches back."""
    at = jnp.minimum(start, len(x) - rows)
    rows_M = at + jnp.arange(rows)
    return at, (rows_M >= start) & (rows_M < end)
