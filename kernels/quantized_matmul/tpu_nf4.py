"""NF4's quantiles on a TPU: a table of eight rows is a register, of which a number picks a row in one instruction.

The table has a column for every column of the matrix, so that it is multiplied by the scales of a group, and not the
values. The low three bits of a number are the row; the fourth says which of two values there.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import platform
from phyla.kernels.quantized_matmul.nf4 import CODE_BOOK, DECADES, dynamic_value
from phyla.kernels.tpu import SUBLANES

BY_COLUMN = jax.lax.GatherDimensionNumbers(
    offset_dims=(),
    collapsed_slice_dims=(0,),
    start_index_map=(0,),
    operand_batching_dims=(1,),
    start_indices_batching_dims=(1,),
)


def quantiles(number_RxN: jax.Array, scale_1xN: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The quantiles of four-bit numbers, in two's complement, times the scales of their columns.

    Args:
        number_RxN: int32, of a group; 8 divides R.
        scale_1xN: float32.
        dtype: float32 or bfloat16.

    Returns:
        Float32 [R, N]. For bfloat16, the upper halves are the products rounded to it, and the lower halves are less
        than half a unit, so that a matrix unit rounds to the same. (Where the scale is below 0, which rounding it may
        do to an all but empty block, it may be one unit off.)
    """
    low, high = (_table(half, scale_1xN.shape[1]) * scale_1xN for half in CODE_BOOK.reshape(2, SUBLANES))
    parts = _parts(number_RxN)
    if dtype == jnp.bfloat16:
        pair = _pair(low, high)
        # A number of 8 or more is negative here, so that its bit 4 is set: 16 places move the lower half up.
        moved = jnp.concatenate([_pick(pair, part) << (part & 16) for part in parts])
        return jax.lax.bitcast_convert_type(moved, jnp.float32)
    return jnp.concatenate([jnp.where(part < 0, _pick(high, part), _pick(low, part)) for part in parts])


def scales(codes_GxN: jax.Array, of_scales: jax.Array, mean_1x1: jax.Array) -> jax.Array:
    """Those of blocks, float32 [G, N], from their codes, `NF4.scales_of_scales` and their mean."""
    G, N = codes_GxN.shape
    if G % SUBLANES:
        return dynamic_value(codes_GxN) * of_scales + mean_1x1
    table = _table(DECADES, N)
    decade = lambda number: jnp.concatenate([_pick(table, part) for part in _parts(number)])  # noqa: E731
    return dynamic_value(codes_GxN, decade) * of_scales + mean_1x1


def _table(values_8: np.ndarray, columns: int) -> jax.Array:
    """The same in each column, float32 [8, columns]."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, columns), 0)
    table = jnp.full(row.shape, values_8[0])
    for i, value in enumerate(values_8[1:], 1):
        table = jnp.where(row == i, value, table)
    return table


def _parts(number: jax.Array) -> list[jax.Array]:
    return [number[start : start + SUBLANES] for start in range(0, number.shape[0], SUBLANES)]


def _pair(upper: jax.Array, lower: jax.Array) -> jax.Array:
    """Both rounded to bfloat16, in the halves of one int32."""
    if platform() == "tpu":
        return pltpu.bitcast(pltpu.pack_elementwise([lower, upper], packed_dtype=jnp.bfloat16), jnp.int32)
    halves = (jax.lax.bitcast_convert_type(each.astype(jnp.bfloat16), jnp.uint16) for each in (upper, lower))
    upper, lower = (half.astype(jnp.int32) for half in halves)  # the interpreter packs nothing
    return upper << 16 | lower


def _pick(table_8xN: jax.Array, number_8xN: jax.Array) -> jax.Array:
    """In each column, the rows that the lowest three bits say."""
    if platform() != "tpu":  # where a gather takes the remainder of a division by 8 anyway
        number_8xN = number_8xN & SUBLANES - 1
    return jax.lax.gather(table_8xN, number_8xN[..., None], BY_COLUMN, (1, 1), mode="promise_in_bounds")
