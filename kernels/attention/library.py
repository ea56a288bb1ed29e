"""The library's attention: the specification, and what accelerators use."""

import jax
import jax.numpy as jnp

from phyla.kernels.attention.mask import linear_bias, seen


def attention_library(q, k, v, queries, keys, *, causal, window, stride, everywhere, slopes):
    """`jax.nn.dot_product_attention` with the mask and the bias written out."""
    mask_BxTxS = seen(queries, keys, causal, window, stride, everywhere)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if slopes is None else linear_bias(slopes, queries, keys)[None],
        mask=jnp.broadcast_to(mask_BxTxS, (len(q), *mask_BxTxS.shape[1:]))[:, None],
    )
