"""NF4's quantiles on a TPU: a table of eight rows is a register, and each number picks its row of it in one instruction.

The table has a column for every column of the matrix, so that it is multiplied by the scales of a group, and not the
values. The low three bits of a number are the row; the fourth says which of two values there.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import platform
from phyla.kernels.quantized_matmul.nf4 import CODE_BOOK
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
        Float32 [R, N]. For bfloat16, the upper halves are the products rounded to it, and the lower halves are less than
        half a unit, so that a matrix unit rounds to the same. (Where the scale is below 0, which rounding it may do
        to an all but empty block, it may be one unit off.)
    """
    low, high = (values * scale_1xN for values in _book(scale_1xN.shape[1]))
    parts = [number_RxN[start : start + SUBLANES] for start in range(0, number_RxN.shape[0], SUBLANES)]
    if dtype == jnp.bfloat16:
        pair = pltpu.bitcast(pltpu.pack_elementwise([high, low], packed_dtype=jnp.bfloat16), jnp.int32)
        # A number of 8 or more is negative here, so that its bit 4 is set: 16 places move the lower half up.
        return jnp.concatenate([pltpu.bitcast(_pick(pair, part) << (part & 16), jnp.float32) for part in parts])
    return jnp.concatenate([jnp.where(part < 0, _pick(high, part), _pick(low, part)) for part in parts])


def _book(columns: int) -> tuple[jax.Array, jax.Array]:
    """The first and the last eight quantiles, float32 [8, columns]."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, columns), 0)
    halves = []
    for values in CODE_BOOK.reshape(2, SUBLANES):
        half = jnp.full(row.shape, values[0])
        for i, value in enumerate(values[1:], 1):
            half = jnp.where(row == i, value, half)
        halves.append(half)
    return halves[0], halves[1]


def _pick(table_8xN: jax.Array, number_8xN: jax.Array) -> jax.Array:
    """In each column, the rows that the lowest three bits say."""
    if platform() != "tpu":  # whose gather takes the remainder of a division by 8 anyway
        number_8xN = number_8xN & SUBLANES - 1
    return jax.lax.gather(table_8xN, number_8xN[..., None], BY_COLUMN, (1, 1), mode="promise_in_bounds")
