"""State-space duality, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp


def ssd_reference(x, dt, log_decay, B, C, D, initial_state, resets):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None."""
    dtype = initial_state.dtype
    heads_per_group = x.shape[2] // B.shape[2]
    B_BxTxHxN, C_BxTxHxN = (jnp.repeat(v, heads_per_group, axis=2) for v in (B, C))
    D_Hx1 = D.astype(dtype)[:, None]

    def step(h_BxHxPxN, inputs):
        x_BxHxP, dt_BxH, log_decay_BxH, B_BxHxN, C_BxHxN, reset_B = inputs
        if reset_B is not None:
            h_BxHxPxN = jnp.where(reset_B[:, None, None, None], 0, h_BxHxPxN)
        u_BxHxP = dt_BxH[..., None] * x_BxHxP
        decay_BxH = jnp.exp(log_decay_BxH)
        h_BxHxPxN = decay_BxH[..., None, None] * h_BxHxPxN + u_BxHxP[..., None] * B_BxHxN[..., None, :]
        return h_BxHxPxN, jnp.sum(h_BxHxPxN * C_BxHxN[..., None, :], axis=-1) + D_Hx1 * x_BxHxP

    by_time = [jnp.moveaxis(v, 1, 0).astype(dtype) for v in (x, dt, log_decay, B_BxTxHxN, C_BxTxHxN)]
    resets_TxB = None if resets is None else resets.T
    final_state, y_TxBxHxP = jax.lax.scan(step, initial_state, (*by_time, resets_TxB))
    return jnp.moveaxis(y_TxBxHxP, 0, 1).astype(x.dtype), final_state
