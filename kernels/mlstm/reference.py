"""mLSTM, the specification: one token at a time, plain autodiff."""

import math

import jax
import jax.numpy as jnp


def mlstm_reference(q, k, v, i, f, state, resets, gate, epsilon):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None.

    A state of None is `empty`.
    """
    state = state or empty(q, v, gate)
    dtype = state[0].dtype

    def body(state, inputs):
        *token, reset_B = inputs
        if reset_B is not None:
            state = tuple(jnp.where(reset_B.reshape(-1, *(1,) * (s.ndim - 1)), 0, s) for s in state)
        return step(state, *token, gate=gate, epsilon=epsilon)

    by_time = [jnp.moveaxis(x, 1, 0).astype(dtype) for x in (q, k, v, i, f)]
    state, h_TxBxHxV = jax.lax.scan(body, state, (*by_time, None if resets is None else resets.T))
    return jnp.moveaxis(h_TxBxHxV, 0, 1).astype(v.dtype), state


def empty(q, v, gate):
    """The state before anything: zeros, (C [B, H, K, V], n [B, H, K], m [B, H]), of which the sigmoid gate has C."""
    (B, _, H, K), V = q.shape, v.shape[-1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    parts = tuple(jnp.zeros(shape, dtype) for shape in ((B, H, K, V), (B, H, K), (B, H)))
    return parts if gate == "exponential" else parts[:1]


def step(state, q_BxHxK, k_BxHxK, v_BxHxV, i_BxH, f_BxH, gate, epsilon):
    """One token: the state after it, and h [B, H, V]."""
    q_BxHxK = q_BxHxK / math.sqrt(q_BxHxK.shape[-1])
    log_f_BxH = jax.nn.log_sigmoid(f_BxH)

    def write(memory, decay_BxH, weight_BxH):
        C_BxHxKxV = decay_BxH[..., None, None] * memory
        C_BxHxKxV += (weight_BxH[..., None] * k_BxHxK)[..., None] * v_BxHxV[:, :, None]
        return C_BxHxKxV, jnp.einsum("bhkv,bhk->bhv", C_BxHxKxV, q_BxHxK)

    if gate == "sigmoid":
        C_BxHxKxV, h_BxHxV = write(state[0], jnp.exp(log_f_BxH), jnp.exp(jax.nn.log_sigmoid(i_BxH)))
        return (C_BxHxKxV,), h_BxHxV
    C, n_BxHxK, m_BxH = state
    before_BxH, m_BxH = m_BxH, jnp.maximum(jnp.maximum(log_f_BxH + m_BxH, i_BxH), 0)
    decay_BxH = jnp.exp(log_f_BxH + (before_BxH - m_BxH))  # in this order: the difference is exact where m hardly moves
    weight_BxH = jnp.exp(i_BxH - m_BxH)
    C_BxHxKxV, read_BxHxV = write(C, decay_BxH, weight_BxH)
    n_BxHxK = decay_BxH[..., None] * n_BxHxK + weight_BxH[..., None] * k_BxHxK
    norm_BxH = jnp.abs(jnp.einsum("bhk,bhk->bh", n_BxHxK, q_BxHxK))
    h_BxHxV = read_BxHxV / (jnp.maximum(norm_BxH, jnp.exp(-m_BxH)) + epsilon)[..., None]
    return (C_BxHxKxV, n_BxHxK, m_BxH), h_BxHxV
