"""WKV-6 for XLA: chunks of 32 tokens as matrix products, without an exp of anything positive.

The weight of an earlier token s in a later t is exp of the sum of w between them. Cut their chunk into halves, again
and again: at one scale s is in the left half of a block and t in the right, and the weight is exp(s to the middle)
exp(the middle to t). So at every scale, from pairs of tokens to the chunk, the scores between halves are a product of
queries and keys that have one exp each. The sums are matrix products with zeros and ones: they contain no other w, and
nothing is ever subtracted, so that a w of any size spoils no digit of the others.

Only the inputs are kept for the backward pass, which recomputes the rest. Arrays are [N, B, H, C, K]: chunk, batch,
head, token of the chunk, channel.
"""

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 32  # a power of two


def wkv6_xla(r, w, k, v, u, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None."""
    if initial_state.dtype != jnp.float32:
        raise ValueError("wkv6: 'xla' computes in float32, but v is float64; cast it or use 'reference'")
    if r.shape[1] == 1:
        return _decode(r, w, k, v, u, initial_state)
    resets = jnp.zeros(r.shape[:2], bool) if resets is None else resets
    y_BxTxHxV, final_state = jax.checkpoint(_chunked)(r, w, k, v, u, initial_state, resets)
    return y_BxTxHxV.astype(v.dtype), final_state


def _decode(r, w, k, v, u, S_BxHxKxV):
    """One token, in the layout of the caller's state."""
    r_BxHxK, w_BxHxK, k_BxHxK, v_BxHxV = (x[:, 0].astype(jnp.float32) for x in (r, w, k, v))
    bonus_BxHx1 = jnp.sum(r_BxHxK * u.astype(jnp.float32) * k_BxHxK, -1, keepdims=True)
    y_BxHxV = jnp.einsum("bhk,bhkv->bhv", r_BxHxK, S_BxHxKxV) + bonus_BxHx1 * v_BxHxV
    S_BxHxKxV = jnp.exp(w_BxHxK)[..., None] * S_BxHxKxV + k_BxHxK[..., None] * v_BxHxV[..., None, :]
    return y_BxHxV[:, None].astype(v.dtype), S_BxHxKxV


def _chunked(r, w, k, v, u, S_BxHxKxV, resets):
    T = r.shape[1]
    C = min(CHUNK, 1 << (T - 1).bit_length())
    r, w, k, v = (_split(x.astype(jnp.float32), C) for x in (r, w, k, v))
    segments_NxBx1xC = jnp.cumsum(_split(resets[:, :, None, None], C)[..., 0], -1)  # in the chunk; 0: of its start
    last_NxBx1x1 = segments_NxBx1xC[..., -1:]
    index = np.arange(C)

    def decay(terms_CxC):
        """exp of the sums of those w, j, that belong to token t."""
        batch = jnp.broadcast_to(terms_CxC.astype(np.float32), (*w.shape[:3], C, C))
        return jnp.exp(_einsum("nbhtj,nbhjk->nbhtk", batch, w))

    scores = jnp.zeros((*w.shape[:3], C, C))
    for terms_CxC, pairs_CxC in _scales(C):
        weights = decay(terms_CxC)
        at_scale = _einsum("nbhtk,nbhsk->nbhts", r * weights, k * weights)
        scores += jnp.where(pairs_CxC, at_scale, 0)
    same = segments_NxBx1xC[..., :, None] == segments_NxBx1xC[..., None, :]
    y = _einsum("nbhts,nbhsv->nbhtv", jnp.where(same, scores, 0), v)
    y += jnp.sum(r * k * u.astype(jnp.float32)[:, None], -1, keepdims=True) * v

    # Where the state may be infinite in another document, the product is masked and not its factor: 0 × inf is not 0.
    to_end = (segments_NxBx1xC == last_NxBx1x1)[..., None]
    added_NxBxHxKxV = _einsum("nbhtk,nbhtv->nbhkv", jnp.where(to_end, k * decay(index > index[:, None]), 0), v)

    def carry(S_BxHxKxV, inputs):
        decay_BxHxK, added_BxHxKxV, cut_Bx1x1x1 = inputs
        kept_BxHxKxV = jnp.where(cut_Bx1x1x1, 0, S_BxHxKxV)
        return decay_BxHxK[..., None] * kept_BxHxKxV + added_BxHxKxV, S_BxHxKxV

    inputs = (jnp.exp(w.sum(-2)), added_NxBxHxKxV, last_NxBx1x1[..., None] > 0)
    S_BxHxKxV, starts_NxBxHxKxV = jax.lax.scan(carry, S_BxHxKxV, inputs)
    from_start = (segments_NxBx1xC == 0)[..., None]
    past = _einsum("nbhtk,nbhkv->nbhtv", r * decay(index < index[:, None]), starts_NxBxHxKxV)
    y += jnp.where(from_start, past, 0)
    N, B, H, C, V = y.shape
    return y.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, V)[:, :T], S_BxHxKxV


def _scales(C):
    """For blocks of 2, 4, … C tokens.

    Yields which tokens j lie between token t and the middle of its block, [t, j]; and which pairs [t, s] have t in the
    right half of a block and s in the left.
    """
    t, j = np.arange(C)[:, None], np.arange(C)
    for half in (1 << i for i in range(C.bit_length() - 1)):
        right = t // half % 2 == 1
        yield (t // half == j // half) & np.where(right, j < t, j > t), right & (t // half == j // half + 1)


def _einsum(spec, a, b):
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def _split(x_BxTxHxK, C):
    """[B, T, H, K] to [N, B, H, C, K], padded with zeros: w = 0 and k = 0 leave the state as it is."""
    B, T, H, K = x_BxTxHxK.shape
    padded = jnp.pad(x_BxTxHxK, ((0, 0), (0, -T % C), (0, 0), (0, 0)))
    return padded.reshape(B, -1, C, H, K).transpose(1, 0, 3, 2, 4)
