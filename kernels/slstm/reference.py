"""sLSTM, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp


def slstm_reference(i, f, z, o, R, bias, initial_state, resets):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None."""
    dtype = initial_state[0].dtype
    R_GxHxPxP, bias_GxHxP = R.astype(dtype), bias.astype(dtype)

    def step(state, inputs):
        gates_GxBxHxP, reset_B = inputs
        if reset_B is not None:
            state = jax.tree.map(lambda s: jnp.where(reset_B[:, None, None], 0, s), state)
        c, n, h, m = state
        recurrent_GxBxHxP = jnp.einsum("bhp,ghpq->gbhq", h, R_GxHxPxP)
        i, f, z, o = gates_GxBxHxP + recurrent_GxBxHxP + bias_GxHxP[:, None]
        # The stabiliser of a state in which nothing has been seen is -inf.
        decay = jax.nn.log_sigmoid(f) + jnp.where(n == 0, -jnp.inf, m)
        m = jnp.maximum(i, decay)
        keep, write = jnp.exp(decay - m), jnp.exp(i - m)
        c = keep * c + write * jnp.tanh(z)
        n = keep * n + write
        h = jax.nn.sigmoid(o) * c / n
        return (c, n, h, m), h

    gates_TxGxBxHxP = jnp.stack([jnp.moveaxis(v, 1, 0).astype(dtype) for v in (i, f, z, o)], axis=1)
    resets_TxB = None if resets is None else resets.T
    final_state, y_TxBxHxP = jax.lax.scan(step, initial_state, (gates_TxGxBxHxP, resets_TxB))
    return jnp.moveaxis(y_TxBxHxP, 0, 1).astype(i.dtype), final_state
