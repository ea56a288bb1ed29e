"""WKV-7 for XLA: chunks of time as matrix products, and a backward pass that recomputes them.

Let S be the state at the start of a chunk and P_t the product of the decays up to token t. The state divided by P_t
only adds up, so u_t = S_{t-1} a_t is a sum over earlier tokens and S, and so is y_t:

    U = (I - A_ab)^-1 (A_ak V + a Sᵀ)        A_xz[t, s] = (P_{t-1} a_t) · (z_s / P_s) for s < t
    Y = A_rb U + A_rk V + r Sᵀ               A_rz[t, s] = (P_t r_t) · (z_s / P_s) for s <= t

(with a and r times their P; the WY form of a product of matrices that are diagonal plus of rank one). What does not
need S is computed for all chunks at once; only S goes through a loop, whose body runs on one thread on a CPU. V is
multiplied last, so that a masked entry never meets an infinity.

Only the inputs and the state at the start of every chunk are kept for the backward pass. Arrays are
(chunks, B, H, L, ...), with L tokens in a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 16  # 1 / P is bounded by exp(-CHUNK min(log_w)): e^9.7 for RWKV-7, e^32 for the documented range

_einsum = functools.partial(jnp.einsum, precision="highest")
_matmul = functools.partial(jnp.matmul, precision="highest")


def wkv7_xla(r, log_w, k, v, a, b, initial_state, resets):
    """Run in float32. `resets` is bool [B, T] or None."""
    if initial_state.dtype != jnp.float32:
        raise ValueError("wkv7: 'xla' computes in float32, but v is float64; cast it or use 'reference'")
    if v.shape[1] == 1:
        return _decode(r, log_w, k, v, a, b, initial_state)
    return _scan(r, log_w, k, v, a, b, initial_state, resets)


def _decode(r, log_w, k, v, a, b, S_BxHxVxK):
    """One token, without a loop."""
    dtype = v.dtype
    r, log_w, k, v, a, b = (x[:, 0].astype(jnp.float32) for x in (r, log_w, k, v, a, b))
    u_BxHxV = _einsum("bhvk,bhk->bhv", S_BxHxVxK, a)
    S_BxHxVxK = S_BxHxVxK * jnp.exp(log_w)[:, :, None]
    S_BxHxVxK += u_BxHxV[..., None] * b[:, :, None] + v[..., None] * k[:, :, None]
    return _einsum("bhvk,bhk->bhv", S_BxHxVxK, r)[:, None].astype(dtype), S_BxHxVxK


class _Chunks(NamedTuple):
    """What each chunk does to S: Y = inside + reads Sᵀ, then S becomes S decay + (S removesᵀ) ends + valuesᵀ keys."""

    inside: jax.Array  # [..., L, V]
    reads: jax.Array  # [..., L, K]
    decay: jax.Array  # [..., 1, K]
    removes: jax.Array  # [..., L, K]
    ends: jax.Array  # [..., L, K]
    values: jax.Array  # [..., L, V]
    keys: jax.Array  # [..., L, K]


@jax.custom_vjp
def _scan(r, log_w, k, v, a, b, initial_state, resets) -> tuple[jax.Array, jax.Array]:
    return _forward(r, log_w, k, v, a, b, initial_state, resets)[0]


def _forward(r, log_w, k, v, a, b, initial_state, resets):
    inputs = (r, log_w, k, v, a, b)
    documents = _documents(resets)
    seen = None if documents is None else documents == 0  # tokens of the document that S belongs to
    chunks = _chunks(inputs, documents)

    def step(S, chunk):
        decay, removes, ends, values, keys, goes_on = chunk
        removed = _einsum("bhlk,bhvk->bhlv", removes, S)
        after = _where(goes_on, S * decay + _einsum("bhlv,bhlk->bhvk", removed, ends))
        return after + _einsum("bhlv,bhlk->bhvk", values, keys), S

    goes_on = None if seen is None else seen[..., -1:, :]
    final_state, S = jax.lax.scan(step, initial_state, (*chunks[2:], goes_on))
    y = chunks.inside + _where(seen, _einsum("nbhlk,nbhvk->nbhlv", chunks.reads, S))
    return (_join(y, v), final_state), (inputs, resets, S)


def _backward(saved, cotangents):
    inputs, resets, S = saved
    dy, d_final = cotangents
    dy = _split(dy)
    chunks, pull = jax.vjp(lambda inputs: _chunks(inputs, _documents(resets)), inputs)

    def step(dS, chunk):  # dS is of the state after the chunk
        reads, decay, removes, ends, dy = chunk
        d_removed = _einsum("bhlk,bhvk->bhlv", ends, dS)
        before = dS * decay + _einsum("bhlv,bhlk->bhvk", d_removed, removes) + _einsum("bhlv,bhlk->bhvk", dy, reads)
        return before, (dS, d_removed)

    d_initial, (dS, d_removed) = jax.lax.scan(step, d_final, (*chunks[1:5], dy), reverse=True)
    removed = _einsum("nbhlk,nbhvk->nbhlv", chunks.removes, S)
    d_chunks = _Chunks(
        inside=dy,
        reads=_einsum("nbhlv,nbhvk->nbhlk", dy, S),
        decay=jnp.sum(dS * S, -2, keepdims=True),
        removes=_einsum("nbhlv,nbhvk->nbhlk", d_removed, S),
        ends=_einsum("nbhlv,nbhvk->nbhlk", removed, dS),
        values=_einsum("nbhlk,nbhvk->nbhlv", chunks.keys, dS),
        keys=_einsum("nbhlv,nbhvk->nbhlk", chunks.values, dS),
    )
    (gradients,) = pull(d_chunks)
    return *gradients, d_initial, None


_scan.defvjp(_forward, _backward)


def _chunks(inputs, documents):
    """All of each chunk that does not need the state at its start."""
    r, log_w, k, v, a, b = map(_split, inputs)
    L = r.shape[-2]
    now = jnp.tri(L, dtype=bool)
    if documents is not None:
        now &= documents == jnp.swapaxes(documents, -1, -2)
    log_P = _matmul(now.astype(jnp.float32), log_w)  # of the document so far, so that no gradient leaves it
    P, inverse_P = jnp.exp(log_P), jnp.exp(-log_P)  # not 1 / P, whose derivative squares it
    decay = P[..., -1:, :]
    a, r = a * jnp.exp(log_P - log_w), r * P
    b, k = b * inverse_P, k * inverse_P
    earlier = now & jnp.tri(L, k=-1, dtype=bool)
    A_ab, A_ak = (jnp.where(earlier, _einsum("...tk,...sk->...ts", a, x), 0) for x in (b, k))
    A_rb, A_rk = (jnp.where(now, _einsum("...tk,...sk->...ts", r, x), 0) for x in (b, k))
    b, k = b * decay, k * decay  # from here on, as they are at the end of the chunk
    if documents is not None:
        in_first, in_last = documents == 0, documents == documents[..., -1:, :]
        a, r, b, k = (jnp.where(m, x, 0) for m, x in ((in_first, a), (in_first, r), (in_last, b), (in_last, k)))
        decay = jnp.where(in_first[..., -1:, :], decay, 0)
    inverse = _inverse(A_ab)
    removes, writes = _matmul(inverse, a), _matmul(inverse, A_ak)  # U = removes Sᵀ + writes V
    return _Chunks(
        inside=_matmul(A_rk + _matmul(A_rb, writes), v),
        reads=r + _matmul(A_rb, removes),
        decay=decay,
        removes=removes,
        ends=b,
        values=v,
        keys=k + _einsum("...ts,...tk->...sk", writes, b),
    )


@jax.custom_jvp
def _inverse(A):
    """(I - A)^-1 for strictly lower triangular A [..., L, L], from that of its diagonal blocks, doubling their size.

    Unlike the product of the (I + A^(2^i)), it needs no powers of A, whose entries grow and cancel.
    """
    L = A.shape[-1]
    T, size = jnp.eye(L), 1
    while size < L:
        block = jnp.arange(L) // size
        below = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        corner = jnp.where(below, A, 0)
        T = T + (corner if size == 1 else _matmul(T, _matmul(corner, T)))
        size *= 2
    return T


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    T = _inverse(*primals)
    return T, _matmul(T, _matmul(tangents[0], T))


def _documents(resets):
    """How many documents began in the chunk so far, [chunks, B, 1, L, 1]; None if there are none."""
    return None if resets is None else jnp.cumsum(_split(resets[:, :, None, None].astype(jnp.float32)), -2)


def _where(mask, x):
    return x if mask is None else jnp.where(mask, x, 0)


def _split(x):
    """[B, T, H, K] to [chunks, B, H, L, K] in float32, padded with zeros: they leave the state as it is."""
    B, T, H, K = x.shape
    L = min(CHUNK, T)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -T % L), (0, 0), (0, 0)))
    return x.reshape(B, -1, L, H, K).transpose(1, 0, 3, 2, 4)


def _join(x, like):
    """The inverse of `_split`, with the T and the dtype of `like`."""
    B, T, H, V = like.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, V)[:, :T].astype(like.dtype)
