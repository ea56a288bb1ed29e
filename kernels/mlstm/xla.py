"""mLSTM for XLA: chunks of time in matrix products, and a backward pass that recomputes them.

Both gates come down to one causal linear attention in which the decay and the weight of what is written are one number
a head and token, exponentials of something <= 0. Inside a chunk it is two matrix products with a matrix of decays
between them. Forwards, one chunk after another is read where it lies and stays in the cache: on a CPU the products take
little more than moving what is between them. Kept for the backward pass, which does all chunks at once, are the inputs
and the memories at the starts of the chunks. There the normaliser is one more column of v, all ones.

Inside, arrays are (chunk, B, H, time, size): the chunk first, for the scan.
"""

import functools
import math

import jax
import jax.numpy as jnp

from phyla.kernels.mlstm.reference import empty, step

CHUNK = 64


def mlstm_xla(q, k, v, i, f, state, resets, gate, epsilon):
    """Run in float32. `resets` is bool [B, T] or None. Where `state` is None, a single chunk reads no memory."""
    reads = state is not None or q.shape[1] > CHUNK
    state = state or empty(q, v, gate)
    if state[0].dtype != jnp.float32:
        raise ValueError("mlstm: 'xla' computes in float32, but v is float64; cast it or use 'reference'")
    i_BxTxH, f_BxTxH = i.astype(jnp.float32), f.astype(jnp.float32)
    if q.shape[1] == 1:
        token = (x[:, 0].astype(jnp.float32) for x in (q, k, v, i, f))
        state, h_BxHxV = step(state, *token, gate=gate, epsilon=epsilon)
        return h_BxHxV[:, None].astype(v.dtype), state
    log_f_BxTxH = jax.nn.log_sigmoid(f_BxTxH)
    if gate == "sigmoid":
        memory = state if reads else None
        return _attend(epsilon, q, k, v, jax.nn.log_sigmoid(i_BxTxH), log_f_BxTxH, None, memory, resets)
    C_BxHxKxV, n_BxHxK, m_BxH = state
    m_BxTxH = stabiliser(log_f_BxTxH, i_BxTxH, m_BxH, resets)
    memory = (C_BxHxKxV, n_BxHxK[..., None]) if reads else None
    h, (C, n) = _attend(epsilon, q, k, v, i_BxTxH, log_f_BxTxH, (m_BxH, m_BxTxH), memory, resets)
    return h, (C, n[..., 0], m_BxTxH[:, -1])


def stabiliser(log_f_BxTxH, i_BxTxH, m_BxH, resets):
    """m_t = max(log_f_t + m_{t-1}, i_t, 0) for all t, with m_{t-1} = 0 at a reset."""
    shift = log_f_BxTxH if resets is None else jnp.where(resets[..., None], -1e30, log_f_BxTxH)

    def after(first, second):  # of two maps m -> max(m + shift, least)
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    shift, least = jax.lax.associative_scan(after, (shift, jnp.maximum(i_BxTxH, 0)), axis=1)
    return jnp.maximum(m_BxH[:, None] + shift, least)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(epsilon, q, k, v, log_i, log_f, m, memory, resets) -> tuple[jax.Array, tuple]:
    """h [B, T, H, V], and the memory after the last token.

    log_i and log_f are [B, T, H]; m is those before the first and after every token ([B, H], [B, T, H]), or None for
    no normaliser, and log_i <= 0; the memory is (C [B, H, K, V],) or with a normaliser (C, n [B, H, K, 1]), since n as
    a column of C would make rows that vector registers do not divide; None, of at most a chunk, is nothing.
    """
    return _forward(epsilon, q, k, v, log_i, log_f, m, memory, resets)[0]


def _forward(epsilon, q, k, v, log_i, log_f, m, memory, resets):
    log_weight, log_decay = stabilise(log_i, log_f, m)
    L = min(CHUNK, q.shape[1])
    tokens = q, k, v, log_weight, log_decay, m and m[1], resets
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % L), *((0, 0),) * (x.ndim - 2))), tokens)

    def chunk(before, n):
        q, k, v, log_weight, log_decay, m, resets = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, n * L, L, 1), padded
        )
        q_, k_, v_ = _inputs(q, k, v, log_weight)
        between, from_start, to_end = _decays(log_decay, resets)
        weights = (q_ @ _T(k_)) * between

        # to_end goes with v_: this product and that of the weights then read the same transposed k_.
        read, after = [weights @ v_], [_T(k_) @ (to_end * v_)]
        if m is not None:
            read.append(jnp.sum(weights, -1, keepdims=True))
            after.append(_T(k_) @ to_end)
        if before is not None:
            read = [x + _times(from_start, q_ @ memory) for x, memory in zip(read, before, strict=True)]
            decay = from_start[..., -1:, :]
            after = [_times(decay, memory) + x for x, memory in zip(after, before, strict=True)]
        h = read[0] if m is None else read[0] / _norm(read[1], m, epsilon)[0]
        return after, (_join(h, v).astype(v.dtype), before and [x[0] for x in before])

    if memory is None:
        after, (h, starts) = chunk(None, 0)
        h = h[None]
    else:
        after, (h, starts) = jax.lax.scan(chunk, [x[None] for x in memory], jnp.arange(padded[0].shape[1] // L))
    memory = tuple(x[0] for x in after)
    h = jnp.moveaxis(h, 0, 1).reshape(*padded[2].shape)[:, : v.shape[1]]
    return (h, memory), (q, k, v, log_i, log_f, m, resets, starts, memory)


def _backward(epsilon, saved, cotangents):
    q, k, v, log_i, log_f, m, resets, starts, memory = saved
    log_weight, log_decay = stabilise(log_i, log_f, m)
    q_, k_, v_ = _inputs(q, k, v, log_weight)
    if m is not None:
        v_ = jnp.concatenate([v_, jnp.ones_like(v_[..., :1])], -1)
    between, from_start, to_end = _decays(log_decay, resets)
    reads = starts is not None
    memory, d_memory = (jnp.concatenate(x, -1) for x in (memory, cotangents[1]))
    starts = jnp.concatenate(starts, -1) if reads else jnp.zeros_like(memory)[None]
    product = q_ @ _T(k_)
    read = (product * between) @ v_ + _times(from_start, q_ @ starts)
    d_read, dm = _chunks(cotangents[0]), None
    if m is not None:
        norm, d_norm = _norm(read[..., -1:], m[1], epsilon)
        along = jnp.sum(d_read * (read[..., :-1] / norm), -1, keepdims=True)
        d_read = jnp.concatenate([d_read, -along * d_norm], -1) / norm
        # exp(-m) is a factor of all that is read and of norm - epsilon: h depends on m by the share of epsilon.
        dm = _join(-epsilon * along / norm, v)[..., 0]
        dm = dm.at[:, -1].add(-jnp.sum(d_memory * memory, (-1, -2)))

    def chunk(dC, inputs):
        decay, d_start = inputs
        return decay * dC + d_start, dC

    d_starts = _T(q_) @ _times(from_start, d_read)
    d_memory, d_ends = jax.lax.scan(chunk, d_memory, (from_start[..., -1:, :], d_starts), reverse=True)
    d_product = _times(between, d_read @ _T(v_))
    dq_start = _times(from_start, d_read @ _T(starts))
    dk_end = _times(to_end, v_ @ _T(d_ends))
    dq_ = d_product @ k_ + dq_start
    dk_ = _T(d_product) @ q_ + dk_end
    dv_ = _T(product * between) @ d_read + to_end * (k_ @ d_ends)

    # The decay of token t acts on all that is read at t or later of what was written before t. These are summed, not
    # found as differences of running sums: those leave noise where little is passed on, and between documents.
    t = jnp.arange(between.shape[-1])
    before = (t[:, None] < t).astype(jnp.float32)
    read_later = (d_product * product) @ before + jnp.sum(q_ * dq_start, -1, keepdims=True)
    d_decay = jnp.sum(jnp.where(t[:, None] >= t, read_later, 0), -2) + jnp.sum(k_ * dk_end, -1) @ before
    d_decay += jnp.sum(d_ends * _times(from_start[..., -1:, :], starts), (-1, -2))[..., None]

    dq = _join(dq_, v) / math.sqrt(q.shape[-1])
    dk = _join(dk_, v) * jnp.exp(log_weight)[..., None]
    dv = _join(dv_, v)[..., : v.shape[-1]]
    d_weight = _join(jnp.sum(k_ * dk_, -1, keepdims=True), v)[..., 0]
    d_decay = _join(d_decay[..., None], v)[..., 0]
    d_gates = (d_weight, d_decay, None if m is None else (d_decay[:, 0], dm))
    d_parts = (d_memory,) if m is None else (d_memory[..., :-1], d_memory[..., -1:])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *d_gates, d_parts if reads else None, None


_attend.defvjp(_forward, _backward)


def stabilise(log_i, log_f, m):
    """Logarithms, <= 0, of what a token is weighted with and the memory before it multiplied by, [B, T, H]."""
    if m is None:
        return log_i, log_f
    before = jnp.concatenate([m[0][:, None], m[1][:, :-1]], 1)
    return log_i - m[1], log_f + (before - m[1])  # the difference first: it is exact where m hardly moves


def _inputs(q, k, v, log_weight):
    """In chunks and float32: q scaled, k weighted, v."""
    q_ = _chunks(q.astype(jnp.float32) / math.sqrt(q.shape[-1]))
    k_ = _chunks(k.astype(jnp.float32) * jnp.exp(log_weight)[..., None])
    return q_, k_, _chunks(v.astype(jnp.float32))


def _decays(log_decay, resets):
    """Decays: from token s to t [t, s] (0 unless s <= t), from the chunk's start to t, from s to its end [L, 1].

    0 between documents. The sums of logarithms can be large and their differences small: their multiples of 1/256
    are summed apart, which is exact.
    """
    log_decay = _chunks(jnp.maximum(log_decay, -128.0)[..., None])  # exp(-128) is 0
    t = jnp.arange(log_decay.shape[-2])
    causal = t[:, None] >= t
    passes, reached = causal, True

    def running_sum(x):  # a product, since XLA would repeat the additions of a cumsum for every pair of tokens
        return jnp.matmul(causal.astype(jnp.float32), x, precision="highest")

    coarse = jnp.round(log_decay * 256) / 256
    coarse, fine = running_sum(coarse), running_sum(log_decay - coarse)
    if resets is not None:
        document = running_sum(_chunks(resets[:, :, None, None]).astype(jnp.float32))  # the chunk's start is in 0
        passes, reached = causal & (document == _T(document)), document == 0
    between = jnp.where(passes, jnp.exp(jnp.minimum((coarse - _T(coarse)) + (fine - _T(fine)), 0)), 0)
    from_start = jnp.where(reached, jnp.exp(coarse + fine), 0)
    return between, from_start, _T(between[..., -1:, :])


def _norm(n, m, epsilon):
    """What is divided by where the normaliser reads n [..., L, 1], and its derivative by n."""
    least = jnp.exp(-_chunks(m[..., None]))
    return jnp.maximum(jnp.abs(n), least) + epsilon, jnp.where(jnp.abs(n) >= least, jnp.sign(n), 0)


def _times(decay, x):
    """decay · x, and 0 where nothing is left, whatever x was: another document's may have overflowed."""
    return jnp.where(decay > 0, decay * x, 0)


def _T(x):
    return jnp.swapaxes(x, -1, -2)


def _chunks(x):
    """[B, T, H, ...] to [chunk, B, H, L, ...], padded with zeros: they write nothing and leave the memory as it is."""
    B, T, H, *rest = x.shape
    L = min(CHUNK, T)
    x = jnp.pad(x, ((0, 0), (0, -T % L), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, -1, L, H, *rest), (1, 3), (0, 2))


def _join(x, v):
    """[chunk, B, H, L, ...] to [B, T, H, ...], with the T of v."""
    _, B, H, _, *rest = x.shape
    return jnp.moveaxis(x, (0, 2), (1, 3)).reshape(B, -1, H, *rest)[:, : v.shape[1]]
