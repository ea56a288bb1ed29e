"""Which keys a query sees."""

import jax
import jax.numpy as jnp


def distances(queries, keys) -> jax.Array:
    """How far before each query each key lies, int32 [T, S]."""
    return queries.number[:, None] - keys.number[None, :]


def seen(queries, keys, causal: bool, window: int | None, stride: int | None, everywhere: int) -> jax.Array:
    """bool [1 or B, T, S]."""
    distance_TxS = distances(queries, keys)
    seen_TxS = jnp.broadcast_to(keys.number >= 0, distance_TxS.shape)
    if causal:
        seen_TxS &= distance_TxS >= 0
    if window is not None:
        near_TxS = jnp.abs(distance_TxS) < window
        if stride is not None:
            near_TxS |= distance_TxS % stride == 0
        if everywhere:
            near_BxTxS = near_TxS | (_positions(keys) < everywhere)[:, None, :]
            if not causal:
                near_BxTxS |= (_positions(queries) < everywhere)[:, :, None]
            return _of_document(near_BxTxS & seen_TxS, queries, keys)
        seen_TxS &= near_TxS
    return _of_document(seen_TxS[None], queries, keys)


def _positions(tokens) -> jax.Array:
    """In their documents, int32 [1 or B, T]."""
    return tokens.number[None] if tokens.began is None else tokens.number - tokens.began


def _of_document(seen_BxTxS: jax.Array, queries, keys) -> jax.Array:
    if queries.began is None:
        return seen_BxTxS
    return seen_BxTxS & (queries.began[:, :, None] == keys.began[:, None, :])


def linear_bias(slopes: jax.Array, queries, keys) -> jax.Array:
    """float32 [N, T, S]: -slope · |distance|."""
    return -slopes[:, None, None] * jnp.abs(distances(queries, keys)).astype(jnp.float32)
