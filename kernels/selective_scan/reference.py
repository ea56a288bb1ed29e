"""Selective scan, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp


def selective_scan_reference(x, dt, A, B, C, D, initial_state, resets):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None."""
    dtype = initial_state.dtype
    A_DxN, D_D = A.astype(dtype), D.astype(dtype)

    def step(h_BxDxN, inputs):
        x_BxD, dt_BxD, B_BxN, C_BxN, reset_B = inputs
        if reset_B is not None:
            h_BxDxN = jnp.where(reset_B[:, None, None], 0, h_BxDxN)
        decay_BxDxN = jnp.exp(dt_BxD[:, :, None] * A_DxN)
        h_BxDxN = decay_BxDxN * h_BxDxN + (dt_BxD * x_BxD)[:, :, None] * B_BxN[:, None, :]
        y_BxD = jnp.sum(h_BxDxN * C_BxN[:, None, :], axis=-1) + D_D * x_BxD
        return h_BxDxN, y_BxD

    by_time = [jnp.moveaxis(v, 1, 0).astype(dtype) for v in (x, dt, B, C)]
    resets_TxB = None if resets is None else resets.T
    final_state, y_TxBxD = jax.lax.scan(step, initial_state, (*by_time, resets_TxB))
    return jnp.moveaxis(y_TxBxD, 0, 1).astype(x.dtype), final_state
