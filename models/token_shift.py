"""RWKV's token shift: every token beside the one before it."""

import jax
import jax.numpy as jnp

from phyla.kernels.segments import starts


def shift(x: jax.Array, last: jax.Array | None, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The token before each, zeros before the first of a document; and the last token, float32, to hand over.

    Args:
        x: [B, T, D].
        last: the token before the first, [B, D], from an earlier call (zeros if a document begins); None: zeros.
        segment_ids: [B, T], a number for each document; None: one document.

    Returns:
        [B, T, D] in the dtype of x, and float32 [B, D].
    """
    first = jnp.zeros_like(x[:, 0]) if last is None else last.astype(x.dtype)
    before_BxTxD = jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
    if segment_ids is not None:
        before_BxTxD = jnp.where(starts(segment_ids)[:, :, None], 0, before_BxTxD)
    return before_BxTxD, x[:, -1].astype(jnp.float32)
