"""mLSTM for GPUs: linear attention with decay, of which the normaliser is one more value, all ones.

Gates, the stabiliser and the division by the normaliser are XLA's. Kept for the backward pass are the inputs, h and
n . q of every token, and the memory at the start of every chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp

from phyla.kernels.gpu_attention import attend, backward, fit, forward
from phyla.kernels.mlstm.reference import empty
from phyla.kernels.mlstm.xla import mlstm_xla, stabilise, stabiliser


def mlstm_gpu(q, k, v, i, f, state, resets, gate, epsilon):
    """Run in float32. `resets` is bool [B, T] or None. One token is bound by memory, and runs in XLA.

    Raises:
        Unfit: keys of more than 128 numbers, or a chip other than Hopper.
    """
    state = state or empty(q, v, gate)
    if state[0].dtype != jnp.float32:
        raise ValueError("mlstm: 'gpu' computes in float32, but v is float64; cast it or use 'reference'")
    fit("mlstm", q.shape[3])
    if q.shape[1] == 1:
        return mlstm_xla(q, k, v, i, f, state, resets, gate, epsilon)
    i_BxTxH = i.astype(jnp.float32)
    log_f_BxTxH = jax.nn.log_sigmoid(f.astype(jnp.float32))
    scale = 1 / math.sqrt(q.shape[3])
    if gate == "sigmoid":
        h, C_BxHxVxK = attend(q, k, v, jnp.exp(jax.nn.log_sigmoid(i_BxTxH)), log_f_BxTxH, _T(state[0]), resets)
        return (h * scale).astype(v.dtype), (_T(C_BxHxVxK),)
    C_BxHxKxV, n_BxHxK, m_BxH = state
    memory = jnp.concatenate([_T(C_BxHxKxV), n_BxHxK[:, :, None]], 2)
    m_BxTxH = stabiliser(log_f_BxTxH, i_BxTxH, m_BxH, resets)
    h, memory = _attend(epsilon, q, k, v, i_BxTxH, log_f_BxTxH, (m_BxH, m_BxTxH), memory, resets)
    return h, (_T(memory[:, :, :-1]), memory[:, :, -1], m_BxTxH[:, -1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(epsilon, q, k, v, log_i, log_f, m, memory, resets) -> tuple[jax.Array, jax.Array]:
    """h [B, T, H, V], and the memory after the last token.

    log_i and log_f are [B, T, H]; m is those before the first and after every token ([B, H], [B, T, H]); the memory
    [B, H, V, K] has the normaliser as a last row.
    """
    return _run(epsilon, q, k, v, log_i, log_f, m, memory, resets, save=False)[0]


def _run(epsilon, q, k, v, log_i, log_f, m, memory, resets, *, save):
    log_weight, log_decay = stabilise(log_i, log_f, m)
    read, memory, states = forward(q, k, _with_ones(v), jnp.exp(log_weight), log_decay, memory, resets, save=save)
    read *= 1 / math.sqrt(q.shape[3])
    n = read[..., -1]
    h = (read[..., :-1] / _norm(n, m, epsilon)[..., None]).astype(v.dtype)
    return (h, memory), (q, k, v, log_i, log_f, m, memory, resets, states, n, h)


def _backward(epsilon, saved, cotangents):
    q, k, v, log_i, log_f, m, memory, resets, states, n, h = saved
    dh, d_memory = cotangents
    log_weight, log_decay = stabilise(log_i, log_f, m)
    norm = _norm(n, m, epsilon)
    dh = dh.astype(jnp.float32)
    along = jnp.sum(dh * h, -1)
    d_n = jnp.where(jnp.abs(n) >= jnp.exp(-m[1]), -along * jnp.sign(n), 0)
    d_read = jnp.concatenate([dh, d_n[..., None]], -1) / (norm * math.sqrt(q.shape[3]))[..., None]
    # exp(-m) is a factor of all that is read and of norm - epsilon: h depends on m by the share of epsilon.
    dm = -epsilon * along / norm
    dm = dm.at[:, -1].add(-jnp.sum(d_memory * memory, (-1, -2)))
    weight = jnp.exp(log_weight)
    dq, dk, dv, d_weight, d_decay, d_memory = backward(
        q, k, _with_ones(v), weight, log_decay, resets, states, d_read, d_memory
    )
    d_gates = (d_weight * weight, d_decay, (d_decay[:, 0], dm))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv[..., :-1].astype(v.dtype), *d_gates, d_memory, None


_attend.defvjp(functools.partial(_run, save=True), _backward)


def _norm(n, m, epsilon):
    """What is read is divided by, [B, T, H]."""
    return jnp.maximum(jnp.abs(n), jnp.exp(-m[1])) + epsilon


def _with_ones(v):
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _T(x):
    return jnp.swapaxes(x, -1, -2)
