"""WKV-4 for XLA: one step of every chunk of time at once.

The sums of a chunk on its own have a closed form, so that two short loops replace a long one: over the K chunks, to
carry the state from each to the next, and over the L steps, of all chunks together. The gradients of the states obey
a linear recurrence: they too run over the steps of all chunks from zero, with the factor for what later chunks add.

Only the inputs and the state at the start of each chunk are kept for the backward pass. Inside, arrays are
[L, K, B, D]; a state is (aa, bb, pp).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phyla.kernels.wkv4.reference import EMPTY, add

CHUNK = 16


def wkv4_xla(k, v, w, u, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None."""
    aa_BxD, bb_BxD, pp_BxD = initial_state
    if aa_BxD.dtype != jnp.float32:
        raise ValueError("wkv4: 'xla' computes in float32, but v is float64; cast it or use 'reference'")
    pp_BxD = jnp.where(bb_BxD == 0, EMPTY, pp_BxD)
    k_BxTxD, v_BxTxD, w_D, u_D = (x.astype(jnp.float32) for x in (k, v, w, u))
    B, T, _ = k.shape
    if T == 1:
        y_BxD, _ = add((aa_BxD, bb_BxD, pp_BxD), u_D + k_BxTxD[:, 0], v_BxTxD[:, 0])
        _, state = add((aa_BxD, bb_BxD, pp_BxD + w_D), k_BxTxD[:, 0], v_BxTxD[:, 0])
        return y_BxD[:, None].astype(v.dtype), state
    resets = jnp.zeros((B, T), bool) if resets is None else resets
    y_BxTxD, (aa, bb, pp) = _scan(k_BxTxD, v_BxTxD, w_D, u_D, (aa_BxD, bb_BxD, pp_BxD), resets)
    # The gradients of aa and bb take pp for a constant. Here it is not: it is the largest exponent that is left.
    # (An index and `where`, because the gradient of a maximum compares for equality what XLA may compute twice.)
    last_B = jnp.max(jnp.where(resets, jnp.arange(T), 0), axis=1)
    left_BxT = jnp.arange(T) >= last_B[:, None]
    age_T = np.arange(T - 1, -1, -1, dtype=np.float32)
    exponents_BxTxD = jnp.where(left_BxT[:, :, None], k_BxTxD + w_D * age_T[:, None], -jnp.inf)
    winner_Bx1xD = jnp.argmax(jax.lax.stop_gradient(exponents_BxTxD), axis=1, keepdims=True)
    largest_BxD = jnp.take_along_axis(exponents_BxTxD, winner_Bx1xD, axis=1)[:, 0]
    initial_BxD = jnp.where(jnp.any(resets, 1)[:, None], EMPTY, pp_BxD) + T * w_D
    exact_BxD = jnp.where(largest_BxD > initial_BxD, largest_BxD, initial_BxD)
    scale_BxD = jnp.exp(jax.lax.stop_gradient(pp) - exact_BxD)  # 1, but for rounding and its gradient
    return y_BxTxD.astype(v.dtype), (aa * scale_BxD, bb * scale_BxD, exact_BxD)


@jax.custom_vjp
def _scan(k, v, w, u, state, resets) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _forward(k, v, w, u, state, resets)[0]


def _forward(k, v, w, u, state, resets):
    chunks = _chunks(k, v, resets)
    exponents = jnp.where(chunks.left, chunks.k + chunks.after * w, -jnp.inf)
    pp_KxBxD = jax.lax.stop_gradient(exponents.max(0))  # only a scale
    weights = jnp.exp(exponents - pp_KxBxD)
    own_KxBxD = (weights * chunks.v).sum(0), weights.sum(0), pp_KxBxD

    def carry(state, inputs):
        (own_aa, own_bb, own_pp), length, cut_Bx1 = inputs
        aa, bb, pp = _reset(state, cut_Bx1)
        largest, past, own = _weigh(pp + length * w, own_pp)
        return (past * aa + own * own_aa, past * bb + own * own_bb, largest), state

    cut_KxBx1 = chunks.resets.any(0)
    final_state, starts_KxBxD = jax.lax.scan(carry, state, (own_KxBxD, chunks.lengths, cut_KxBx1))

    def step(state, inputs):
        k_KxBxD, v_KxBxD, reset_KxBx1 = inputs
        state = _reset(state, reset_KxBx1)
        _, past, present = _weigh(state[2], u + k_KxBxD)
        y_KxBxD = (past * state[0] + present * v_KxBxD) / (past * state[1] + present)
        return _advance(state, k_KxBxD, v_KxBxD, w), y_KxBxD

    _, y = jax.lax.scan(step, starts_KxBxD, (chunks.k, chunks.v, chunks.resets))
    return (_join(y, k), final_state), (k, v, w, u, state, resets, starts_KxBxD)


def _backward(saved, cotangents):
    k, v, w, u, state, resets, starts_KxBxD = saved
    dy_BxTxD, (daa_BxD, dbb_BxD, _) = cotangents
    chunks = _chunks(k, v, resets)
    dy = _split(dy_BxTxD)

    def recompute(state, inputs):
        k_KxBxD, v_KxBxD, reset_KxBx1 = inputs
        state = _reset(state, reset_KxBx1)
        return _advance(state, k_KxBxD, v_KxBxD, w), state

    _, (aa, bb, pp) = jax.lax.scan(recompute, starts_KxBxD, (chunks.k, chunks.v, chunks.resets))
    # Of every token at once: the output, and how much of the past and of the present are in it and in the next state.
    _, past, present = _weigh(pp, u + chunks.k)
    sum_ = past * bb + present
    y = (past * aa + present * chunks.v) / sum_
    dy = dy / sum_
    _, kept, added = _weigh(pp + w, chunks.k)
    kept, added = jnp.where(chunks.present, kept, 1), jnp.where(chunks.present, added, 0)

    def step(after, inputs):
        """Gradients of aa and bb after this token, and the share of what comes from later chunks."""
        daa, dbb, kept = inputs
        return (daa + kept * after[0], dbb + kept * after[1], kept * after[2]), after

    zeros = jnp.zeros_like(starts_KxBxD[0])
    inputs = (past * dy, -past * dy * y, kept)  # of which the first token of a document has zeros
    (own_daa, own_dbb, share), (daa, dbb, later) = jax.lax.scan(
        step, (zeros, zeros, jnp.ones_like(zeros)), inputs, reverse=True
    )

    def carry(after, inputs):
        own_daa, own_dbb, share = inputs
        return (own_daa + share * after[0], own_dbb + share * after[1]), after

    (daa_BxD, dbb_BxD), (later_daa, later_dbb) = jax.lax.scan(
        carry, (daa_BxD, dbb_BxD), (own_daa, own_dbb, share), reverse=True
    )
    daa, dbb = daa + later * later_daa, dbb + later * later_dbb
    d_bonus = present * (chunks.v - y) * dy
    dk = d_bonus + added * (chunks.v * daa + dbb)
    dv = present * dy + added * daa
    dw = jnp.where(chunks.present, kept * (aa * daa + bb * dbb), 0)
    d_state = daa_BxD, dbb_BxD, state[0] * daa_BxD + state[1] * dbb_BxD
    return _join(dk, k), _join(dv, k), dw.sum((0, 1, 2)), d_bonus.sum((0, 1, 2)), d_state, None


_scan.defvjp(_forward, _backward)


class _Chunks(NamedTuple):
    """The inputs [L, K, B, D] and what is known of their positions; the end of the last chunk may be padding."""

    k: jax.Array
    v: jax.Array
    resets: jax.Array  # [L, K, B, 1]
    present: np.ndarray  # not padding, [L, K, 1, 1]
    after: np.ndarray  # how many tokens of the chunk come later, [L, K, 1, 1]
    lengths: np.ndarray  # [K]
    left: jax.Array  # no reset comes later, and not padding, [L, K, B, 1]


def _chunks(k, v, resets):
    resets_LxKxBx1 = _split(resets[:, :, None])
    L, K = resets_LxKxBx1.shape[:2]
    present = (np.arange(K * L) < k.shape[1]).reshape(K, L).T
    lengths_K = present.sum(0)
    after = np.maximum(lengths_K - 1 - np.arange(L)[:, None], 0)[:, :, None, None].astype(np.float32)
    present = present[:, :, None, None]
    later = jnp.cumsum(resets_LxKxBx1[::-1], 0)[::-1] - resets_LxKxBx1
    return _Chunks(
        _split(k), _split(v), resets_LxKxBx1, present, after, lengths_K.astype(np.float32), (later == 0) & present
    )


def _split(x_BxTxD):
    """[B, T, D] to [L, K, B, D], padded with zeros."""
    B, T, D = x_BxTxD.shape
    L = min(CHUNK, T)
    padded = jnp.pad(x_BxTxD, ((0, 0), (0, -T % L), (0, 0)))
    return padded.reshape(B, -1, L, D).transpose(2, 1, 0, 3)


def _join(x_LxKxBxD, k):
    """[L, K, B, D] to [B, T, D] with the T of k."""
    L, K, B, D = x_LxKxBxD.shape
    return x_LxKxBxD.transpose(2, 1, 0, 3).reshape(B, K * L, D)[:, : k.shape[1]]


def _reset(state, reset):
    return tuple(jnp.where(reset, empty, x) for x, empty in zip(state, (0, 0, EMPTY), strict=True))


def _advance(state, k, v, w):
    aa, bb, pp = state
    largest, past, present = _weigh(pp + w, k)
    return past * aa + present * v, past * bb + present, largest


def _weigh(a, b):
    """The larger exponent, a constant in derivatives because it is only a scale, and exp(a), exp(b) relative to it."""
    largest = jax.lax.stop_gradient(jnp.maximum(a, b))
    return largest, jnp.exp(a - largest), jnp.exp(b - largest)
