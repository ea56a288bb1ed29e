"""WKV-6, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp


def wkv6_reference(r, w, k, v, u, initial_state, resets):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None."""
    dtype = initial_state.dtype
    u_HxK = u.astype(dtype)

    def step(S_BxHxKxV, inputs):
        r_BxHxK, w_BxHxK, k_BxHxK, v_BxHxV, reset_B = inputs
        if reset_B is not None:
            S_BxHxKxV = jnp.where(reset_B[:, None, None, None], 0, S_BxHxKxV)
        kv_BxHxKxV = k_BxHxK[..., None] * v_BxHxV[..., None, :]
        y_BxHxV = jnp.sum(r_BxHxK[..., None] * (S_BxHxKxV + u_HxK[..., None] * kv_BxHxKxV), axis=-2)
        return jnp.exp(w_BxHxK)[..., None] * S_BxHxKxV + kv_BxHxKxV, y_BxHxV

    by_time = [jnp.moveaxis(x, 1, 0).astype(dtype) for x in (r, w, k, v)]
    resets_TxB = None if resets is None else resets.T
    final_state, y_TxBxHxV = jax.lax.scan(step, initial_state, (*by_time, resets_TxB))
    return jnp.moveaxis(y_TxBxHxV, 0, 1).astype(v.dtype), final_state
