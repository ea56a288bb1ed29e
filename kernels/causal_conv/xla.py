"""Depthwise causal convolution for XLA: W shifted multiply-adds, fused into one pass over x.

XLA differentiates this form as well as a hand-written backward pass would do (measured); the checkpoint makes it
keep x itself, not its shifted copies.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.checkpoint, prevent_cse=False)
def causal_conv_xla(x, weight, bias, initial_state, resets):
    """Sum the shifted inputs in the dtype of the state. `resets` is bool [B, T] or None."""
    dtype = initial_state.dtype
    x_BxTxD, weight_WxD = x.astype(dtype), weight.astype(dtype)
    W, T = len(weight), x.shape[1]
    segment_BxT = None if resets is None else jnp.cumsum(resets, axis=1)  # the initial state's is number 0

    def shifted(k):
        """x_{t-k}, or zero where it belongs to another segment than x_t."""
        past, present = initial_state[:, W - 1 - k : W - 1 - k + min(k, T)], x_BxTxD[:, : max(T - k, 0)]
        x_before = jnp.concatenate([past, present], axis=1)
        if segment_BxT is None:
            return x_before
        segment_before = jnp.pad(segment_BxT, ((0, 0), (min(k, T), 0)))[:, :T]
        return jnp.where((segment_before == segment_BxT)[:, :, None], x_before, 0)

    y = sum(shifted(k) * weight_WxD[W - 1 - k] for k in range(W)) + bias.astype(dtype)

    state = jnp.concatenate([initial_state[:, T:], x_BxTxD[:, max(T - W + 1, 0) :]], axis=1)
    if segment_BxT is not None:
        segments = jnp.pad(segment_BxT, ((0, 0), (W - 1, 0)))[:, T:]
        state = jnp.where((segments == segment_BxT[:, -1:])[:, :, None], state, 0)
    return y.astype(x.dtype), state
