"""Which keys a query sees."""

import jax
import jax.numpy as jnp


def distances(queries, keys) -> jax.Array:
    """How far before each query each key lies, int32 [T, S]."""
    return queries.number[:, None] - keys.number[None, :]


def seen(queries, keys, causal: bool, window: int | None) -> jax.Array:
    """bool [1 or B, T, S]."""
    distance_TxS = distances(queries, keys)
    seen_TxS = jnp.broadcast_to(keys.number >= 0, distance_TxS.shape)
    if causal:
        seen_TxS &= distance_TxS >= 0
    if window is not None:
        seen_TxS &= jnp.abs(distance_TxS) < window
    if queries.began is None:
        return seen_TxS[None]
    return seen_TxS & (queries.began[:, :, None] == keys.began[:, None, :])


def linear_bias(slopes: jax.Array, queries, keys) -> jax.Array:
    """float32 [N, T, S]: -slope · |distance|."""
    return -slopes[:, None, None] * jnp.abs(distances(queries, keys)).astype(jnp.float32)
