"""Attention by blocks of queries: never all T × S logits, and only the keys that a block can see.

Each block is checkpointed, so that the backward pass keeps no probabilities. Heads lie before time, which makes the
matrix products of a block contiguous.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from phyla.kernels.attention.mask import linear_bias, seen

BLOCK = 128
MOST_BLOCKS = 32  # unrolled: this bounds compile time

HIDDEN = -1e30  # a logit that no exp sees, and finite


def attention_xla(q, k, v, queries, keys, *, causal, window, stride, everywhere, slopes):
    """One block after the other."""
    T, N = q.shape[1], q.shape[2]
    groups = N // k.shape[2]
    q_BxKxGxTxH = rearrange(q, "b t (k g) h -> b k g t h", g=groups) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    k_BxKxSxH, v_BxKxSxH = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    size = max(BLOCK, math.ceil(T / MOST_BLOCKS))
    aligned = queries is keys
    reach = window if stride is None and not everywhere else None

    @jax.checkpoint
    def block(q, k, v, queries, keys):
        logits_BxKxGxTxS = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
        if slopes is not None:
            logits_BxKxGxTxS += rearrange(linear_bias(slopes, queries, keys), "(k g) t s -> k g t s", g=groups)
        seen_BxTxS = seen(queries, keys, causal, window, stride, everywhere)
        logits_BxKxGxTxS = jnp.where(seen_BxTxS[:, None, None], logits_BxKxGxTxS, HIDDEN)
        highest = jax.lax.stop_gradient(logits_BxKxGxTxS.max(-1, keepdims=True))
        p_BxKxGxTxS = jnp.exp(logits_BxKxGxTxS - highest)
        y_BxKxGxTxH = jnp.einsum(
            "bkgts,bksh->bkgth", p_BxKxGxTxS.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return y_BxKxGxTxH / p_BxKxGxTxS.sum(-1, keepdims=True)

    def part(tokens, rows):
        return type(tokens)(tokens.number[rows], None if tokens.began is None else tokens.began[:, rows])

    blocks = []
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        first = max(0, rows.start - reach + 1) if aligned and reach is not None else 0
        end = min(rows.stop, T) if causal else T if reach is None else min(rows.stop + reach - 1, T)
        near = slice(first, end) if aligned else slice(None)
        blocks.append(
            block(
                q_BxKxGxTxH[:, :, :, rows],
                k_BxKxSxH[:, :, near],
                v_BxKxSxH[:, :, near],
                part(queries, rows),
                part(keys, near),
            )
        )
    y_BxKxGxTxH = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return rearrange(y_BxKxGxTxH, "b k g t h -> b t (k g) h").astype(q.dtype)
