"""Depthwise causal convolution, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp


def causal_conv_reference(x, weight, bias, initial_state, resets):
    """Scan over time with the last W - 1 inputs as the state. `resets` is bool [B, T] or None."""
    dtype = initial_state.dtype
    weight_WxD, bias_D = weight.astype(dtype), bias.astype(dtype)

    def step(state_BxWxD, inputs):
        x_BxD, reset_B = inputs
        if reset_B is not None:
            state_BxWxD = jnp.where(reset_B[:, None, None], 0, state_BxWxD)
        window_BxWxD = jnp.concatenate([state_BxWxD, x_BxD[:, None]], axis=1)
        return window_BxWxD[:, 1:], jnp.sum(window_BxWxD * weight_WxD, axis=1) + bias_D

    x_TxBxD = jnp.moveaxis(x, 1, 0).astype(dtype)
    final_state, y_TxBxD = jax.lax.scan(step, initial_state, (x_TxBxD, None if resets is None else resets.T))
    return jnp.moveaxis(y_TxBxD, 0, 1).astype(x.dtype), final_state
