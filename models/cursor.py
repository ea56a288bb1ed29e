"""Where a sequence stands: the segment and the position of the last token that a state has seen.

Recurrent state, caches and position encodings share this notion, so that a call on a whole sequence, on its chunks
and on its tokens one by one give the same answer, and packed documents the same as separate ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from phyla.models.held import floats


class Cursor(NamedTuple):
    """The last token seen by each sequence of a batch."""

    segment_B: jax.Array
    position_B: jax.Array


def start(batch: int) -> Cursor:
    """Before the first token of segment 1."""
    return Cursor(jnp.ones((batch,), jnp.int32), jnp.full((batch,), -1, jnp.int32))


def advance(
    cursor: Cursor | None, segment_ids: jax.Array | None, batch: int, length: int
) -> tuple[jax.Array, jax.Array, Cursor]:
    """Segment and position of each of the next `length` tokens, and the cursor after them.

    Args:
        cursor: before these tokens; None is `start`.
        segment_ids: [B, T]; None continues the cursor's segment.
        batch: B.
        length: T.

    Returns:
        segment_ids [B, T], positions within the segment [B, T] and the new cursor.
    """
    cursor = start(batch) if cursor is None else cursor
    if segment_ids is None:
        segments_BxT = jnp.broadcast_to(cursor.segment_B[:, None], (batch, length))
    else:
        segments_BxT = segment_ids.astype(jnp.int32)
    previous_BxT = jnp.concatenate([cursor.segment_B[:, None], segments_BxT[:, :-1]], axis=1)
    index_T = jnp.arange(length, dtype=jnp.int32)
    # The index at which each token's segment began; before this call if the segment goes on.
    began_BxT = jnp.where(segments_BxT != previous_BxT, index_T, -1 - cursor.position_B[:, None])
    positions_BxT = index_T - jax.lax.cummax(began_BxT, axis=1)
    return segments_BxT, positions_BxT, Cursor(segments_BxT[:, -1], positions_BxT[:, -1])


def carry(cursor: Cursor, segment_ids: jax.Array | None, state: Any) -> Any:
    """A recurrent state (arrays [B, ...]), zeroed for the sequences whose next token begins another segment; floats."""
    state = floats(state)
    if segment_ids is None:
        return state
    goes_on_B = segment_ids[:, 0] == cursor.segment_B

    def keep(leaf: jax.Array) -> jax.Array:
        return jnp.where(goes_on_B.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return jax.tree.map(keep, state)
