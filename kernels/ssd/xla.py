"""State-space duality for XLA: a scan over chunks of time, and matrix products inside a chunk.

Within a chunk, y = (decay ∘ C Bᵀ) dt x, attention without softmax; between chunks only the state passes. The backward
pass keeps the inputs and the state before every chunk, and recomputes the rest. One chunk's arrays stay in the cache,
so that this is faster on a CPU than products over all chunks at once.

The log decay between two tokens is a difference of sums over time. So that it is exact whatever came before, the sums
have two parts: multiples of 2^-10, which float32 adds without error, and the remainders. A reset is then nothing but
a decay to zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
FORGET = -128.0  # exp of it, or of less, is 0 in float32

_product = functools.partial(jnp.einsum, precision="highest")


def ssd_xla(x, dt, log_decay, B, C, D, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None."""
    if initial_state.dtype != jnp.float32:
        raise ValueError("ssd: 'xla' computes in float32, but x is float64; cast it or use 'reference'")
    if x.shape[1] == 1:
        return _decode(x, dt, log_decay, B, C, D, initial_state)
    return _scan(x, dt, log_decay, B, C, D, initial_state, resets)


def _decode(x, dt, log_decay, B, C, D, h_BxHxPxN):
    """One token, in the layout of the caller's state."""
    x_BxHxP, dt_BxH, B_BxGxN, C_BxGxN = (v[:, 0].astype(jnp.float32) for v in (x, dt, B, C))
    h_BxGxRxPxN = h_BxHxPxN.reshape(*B_BxGxN.shape[:2], -1, *h_BxHxPxN.shape[2:])
    u_BxGxRxP = (dt_BxH[..., None] * x_BxHxP).reshape(h_BxGxRxPxN.shape[:4])
    decay_BxGxR = jnp.exp(log_decay[:, 0]).reshape(h_BxGxRxPxN.shape[:3])
    h_BxGxRxPxN = decay_BxGxR[..., None, None] * h_BxGxRxPxN + u_BxGxRxP[..., None] * B_BxGxN[:, :, None, None]
    y_BxHxP = _product("bgrpn,bgn->bgrp", h_BxGxRxPxN, C_BxGxN).reshape(x_BxHxP.shape)
    y_BxHxP += D.astype(jnp.float32)[:, None] * x_BxHxP
    return y_BxHxP[:, None].astype(x.dtype), h_BxGxRxPxN.reshape(h_BxHxPxN.shape)


@jax.custom_vjp
def _scan(x, dt, log_decay, B, C, D, initial_state, resets) -> tuple[jax.Array, jax.Array]:
    return _forward(x, dt, log_decay, B, C, D, initial_state, resets)[0]


class _Chunk(NamedTuple):
    """A chunk of L tokens: G groups of R heads of P channels. The scan reads K of them."""

    x: jax.Array  # [B, G, L, R, P]
    dt: jax.Array  # [B, G, R, L]
    sums: jax.Array  # [2, B, G, R, L]: of the log decay since the chunk's start, this token's included, in two parts
    B: jax.Array  # [B, G, L, N]
    C: jax.Array  # [B, G, L, N]


def _forward(x, dt, log_decay, B, C, D, initial_state, resets):
    D_Gx1xRx1 = D.astype(jnp.float32).reshape(B.shape[2], 1, -1, 1)

    def step(h_BxGxNxRxP, chunk):
        chunk = _float32(chunk)
        decay = _decays(chunk.sums)
        scores_BxGxLxL = _product("bgin,bgjn->bgij", chunk.C, chunk.B)
        mixing_BxGxRxLxL = decay.between * scores_BxGxLxL[:, :, None] * chunk.dt[..., None, :]
        y_BxGxLxRxP = _product("bgrij,bgjrp->bgirp", mixing_BxGxRxLxL, chunk.x)
        y_BxGxLxRxP += _fade(_product("bgln,bgnrp->bglrp", chunk.C, h_BxGxNxRxP), decay.since_start)
        y_BxGxLxRxP += D_Gx1xRx1 * chunk.x
        u_at_end = chunk.x * (decay.to_end * _by_token(chunk.dt))
        next_BxGxNxRxP = _fade(h_BxGxNxRxP, decay.whole) + _product("bgln,bglrp->bgnrp", chunk.B, u_at_end)
        return next_BxGxNxRxP, (y_BxGxLxRxP.astype(x.dtype), h_BxGxNxRxP)

    start = _inward(initial_state, B)
    end, (y, h_KxBxGxNxRxP) = jax.lax.scan(step, start, _chunks(x, dt, log_decay, B, C, resets))
    return (_join(y, x), _outward(end)), (x, dt, log_decay, B, C, D, resets, h_KxBxGxNxRxP)


def _backward(saved, cotangents):
    x, dt, log_decay, B, C, D, resets, h_KxBxGxNxRxP = saved
    dy, dh = cotangents
    D_Gx1xRx1 = D.astype(jnp.float32).reshape(B.shape[2], 1, -1, 1)

    def step(g_BxGxNxRxP, inputs):
        chunk, dy, h_BxGxNxRxP = _float32(inputs)
        decay = _decays(chunk.sums)
        dt_BxGxLxRx1 = _by_token(chunk.dt)
        scores_BxGxLxL = _product("bgin,bgjn->bgij", chunk.C, chunk.B)
        # The gradient of u = dt x.
        du_at_end = _product("bgln,bgnrp->bglrp", chunk.B, g_BxGxNxRxP) * decay.to_end
        du = _product("bgrij,bgirp->bgjrp", decay.between * scores_BxGxLxL[:, :, None], dy) + du_at_end
        # The gradient of the mixing matrix; where the decay is 0, x may be an overflow in another document.
        d_mixing = _product("bgirp,bgjrp->bgrij", dy, chunk.x)
        d_mixing = jnp.where(decay.between > 0, d_mixing, 0) * decay.between * chunk.dt[..., None, :]
        d_scores = d_mixing.sum(2)
        # The operands are in the order that transposes the smaller one.
        dy_at_start, u_at_end = dy * decay.since_start, chunk.x * (decay.to_end * dt_BxGxLxRx1)
        dB = _product("bgij,bgin->bgjn", d_scores, chunk.C)
        dB += _product("bgnrp,bglrp->bgnl", g_BxGxNxRxP, u_at_end).swapaxes(2, 3)
        dC = _product("bgij,bgjn->bgin", d_scores, chunk.B)
        dC += _product("bgnrp,bglrp->bgnl", h_BxGxNxRxP, dy_at_start).swapaxes(2, 3)
        # The gradient of a token's log decay: of all that passes it, from earlier tokens (or the chunk's start) to it
        # and later ones (or the chunk's end). A sum of what passes only: no difference of sums, which would cancel.
        y_of_start = _fade(_product("bgln,bgnrp->bglrp", chunk.C, h_BxGxNxRxP), decay.since_start)
        earlier = ~jnp.tri(scores_BxGxLxL.shape[-1], dtype=bool)
        to_later = _product("bgrij,jt->bgrit", d_mixing * scores_BxGxLxL[:, :, None], earlier.astype(jnp.float32))
        to_later += (dy * y_of_start).sum(-1).swapaxes(2, 3)[..., None]
        to_end_BxGxRxL = (dt_BxGxLxRx1 * chunk.x * du_at_end).sum(-1).swapaxes(2, 3)
        g_at_start = _fade(g_BxGxNxRxP, decay.whole)
        d_log_decay_BxGxRxL = (
            jnp.where(earlier, 0, to_later).sum(3)
            + _product("bgrj,jt->bgrt", to_end_BxGxRxL, earlier.astype(jnp.float32))
            + (h_BxGxNxRxP * g_at_start).sum((2, 4))[..., None]
        )
        dx = dt_BxGxLxRx1 * du + D_Gx1xRx1 * dy
        by_head = ((chunk.x * du).sum(-1), d_log_decay_BxGxRxL.swapaxes(2, 3), (dy * chunk.x).sum(-1))
        return g_at_start + _product("bgln,bglrp->bgnrp", chunk.C, dy_at_start), (dx, dB, dC, *by_head)

    inputs = _chunks(x, dt, log_decay, B, C, resets), _grouped(dy, B), h_KxBxGxNxRxP
    g_BxGxNxRxP, by_chunk = jax.lax.scan(step, _inward(dh, B), inputs, reverse=True)
    dx, dB, dC, ddt, d_log_decay, dD = map(_join, by_chunk, (x, B, C, dt, dt, dt))
    gradients = dx, ddt, d_log_decay, dB, dC, dD.sum((0, 1))
    dtypes = (v.dtype for v in (x, dt, log_decay, B, C, D))
    gradients = (v.astype(dtype) for v, dtype in zip(gradients, dtypes, strict=True))
    return *gradients, _outward(g_BxGxNxRxP), None


_scan.defvjp(_forward, _backward)


class _Decays(NamedTuple):
    """Products of a chunk's decays, each at most 1."""

    since_start: jax.Array  # [B, G, L, R, 1]
    to_end: jax.Array  # [B, G, L, R, 1]
    whole: jax.Array  # [B, G, 1, R, 1]
    between: jax.Array  # [B, G, R, L, L]: row i, column j is that from token j to token i


def _decays(sums):
    last = sums[..., -1:]
    causal = jnp.tri(sums.shape[-1], dtype=bool)
    between = (sums[..., :, None] - sums[..., None, :]).sum(0)
    return _Decays(
        since_start=_by_token(jnp.exp(sums.sum(0))),
        to_end=_by_token(jnp.exp((last - sums).sum(0))),
        whole=_by_token(jnp.exp(last.sum(0))),
        between=jnp.exp(jnp.where(causal, between, -jnp.inf)),
    )


def _fade(v, decay):
    """v · decay, and 0 where the decay is, even if v overflowed in another document."""
    return jnp.where(decay > 0, v * decay, 0)


def _chunks(x, dt, log_decay, B, C, resets):
    if resets is not None:
        log_decay = jnp.where(resets[..., None], FORGET, log_decay)
    log_decay = jnp.maximum(log_decay, FORGET)
    coarse = jnp.ceil(log_decay * 2**10) / 2**10
    parts = [jnp.cumsum(_grouped(v, B).swapaxes(3, 4), axis=-1) for v in (coarse, log_decay - coarse)]
    return _Chunk(
        x=_grouped(x, B),
        dt=_grouped(dt, B).swapaxes(3, 4),
        sums=jnp.stack(parts, axis=1),
        B=_split(B).swapaxes(2, 3),
        C=_split(C).swapaxes(2, 3),
    )


def _float32(tree):
    return jax.tree.map(lambda v: v.astype(jnp.float32), tree)


def _by_token(v_BxGxRxL):
    """[B, G, L, R, 1], to multiply what has channels."""
    return v_BxGxRxL.swapaxes(2, 3)[..., None]


def _split(v):
    """[B, T, ...] to [K, B, L, ...], padded with zeros: dt = 0 and log decay = 0 leave the state as it is."""
    B, T = v.shape[:2]
    L = min(CHUNK, T)
    v = jnp.pad(v, ((0, 0), (0, -T % L), *((0, 0),) * (v.ndim - 2)))
    return v.reshape(B, -1, L, *v.shape[2:]).swapaxes(0, 1)


def _grouped(v, B):
    """[B, T, H, ...] to [K, B, G, L, R, ...]."""
    v = _split(v)
    return v.reshape(*v.shape[:3], B.shape[2], -1, *v.shape[4:]).swapaxes(2, 3)


def _join(v, like):
    """[K, B, G, L, ...] to the shape of `like`, [B, T, ...]."""
    v = jnp.transpose(v, (1, 0, 3, 2, *range(4, v.ndim)))
    B, K, L = v.shape[:3]
    return v.reshape(B, K * L, *like.shape[2:])[:, : like.shape[1]]


def _inward(h_BxHxPxN, B):
    """To [B, G, N, R, P]."""
    batch, _, P, N = h_BxHxPxN.shape
    return jnp.moveaxis(h_BxHxPxN.reshape(batch, B.shape[2], -1, P, N), 4, 2)


def _outward(h_BxGxNxRxP):
    """To [B, H, P, N]."""
    batch, _, N, _, P = h_BxGxNxRxP.shape
    return jnp.moveaxis(h_BxGxNxRxP, 2, 4).reshape(batch, -1, P, N)
