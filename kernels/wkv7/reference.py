"""WKV-7, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp


def wkv7_reference(r, log_w, k, v, a, b, initial_state, resets):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None."""
    dtype = initial_state.dtype

    def step(S_BxHxVxK, inputs):
        r_BxHxK, log_w_BxHxK, k_BxHxK, v_BxHxV, a_BxHxK, b_BxHxK, reset_B = inputs
        if reset_B is not None:
            S_BxHxVxK = jnp.where(reset_B[:, None, None, None], 0, S_BxHxVxK)
        u_BxHxV = jnp.sum(S_BxHxVxK * a_BxHxK[:, :, None, :], axis=-1)
        S_BxHxVxK = (
            S_BxHxVxK * jnp.exp(log_w_BxHxK)[:, :, None, :]
            + u_BxHxV[:, :, :, None] * b_BxHxK[:, :, None, :]
            + v_BxHxV[:, :, :, None] * k_BxHxK[:, :, None, :]
        )
        return S_BxHxVxK, jnp.sum(S_BxHxVxK * r_BxHxK[:, :, None, :], axis=-1)

    by_time = [jnp.moveaxis(x, 1, 0).astype(dtype) for x in (r, log_w, k, v, a, b)]
    resets_TxB = None if resets is None else resets.T
    final_state, y_TxBxHxV = jax.lax.scan(step, initial_state, (*by_time, resets_TxB))
    return jnp.moveaxis(y_TxBxHxV, 0, 1).astype(v.dtype), final_state
