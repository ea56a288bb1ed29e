"""Packed documents: where the recurrent state of an op starts afresh."""

import jax
import jax.numpy as jnp


def starts(segment_ids_BxT: jax.Array) -> jax.Array:
    """True at every token whose segment id differs from that of the token before it; bool [B, T].

    The first token is never a start: the initial state belongs to its segment. Only changes count, so that the
    ids 1 1 2 1 are three segments.
    """
    changes = segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)))
