"""Attention by blocks of queries: never all T × S logits, and only the keys that a block can see.

The backward pass makes a block's probabilities again from the largest logit and the total of each row, which with the
inputs and the output is all that the forward pass keeps (Dao et al. 2022, arXiv 2205.14135, algorithm 4): no row's
maximum or sum is taken twice, and those are what a CPU is slowest at. Heads lie before time, which makes the matrix
products of a block contiguous.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from phyla.kernels.attention.mask import linear_bias, seen

BLOCK = 128
MOST_BLOCKS = 32  # unrolled: this bounds compile time

HIDDEN = -1e30  # a logit that no exp sees, and finite


class Sight(NamedTuple):
    """What a query sees; see `attention`."""

    causal: bool
    window: int | None
    stride: int | None
    everywhere: int
    aligned: bool  # queries and keys are the same tokens, in order


class Rows(NamedTuple):
    """Of the softmax, float32 [B, K, G, T, 1] each."""

    highest: jax.Array  # logit
    total: jax.Array  # of the exponentials, the highest of which is 1


def attention_xla(q, k, v, queries, keys, *, causal, window, stride, everywhere, slopes):
    """One block after the other."""
    groups = q.shape[2] // k.shape[2]
    q_BxKxGxTxH = rearrange(q, "b t (k g) h -> b k g t h", g=groups) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    k_BxKxSxH, v_BxKxSxH = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    sight = Sight(causal, window, stride, everywhere, aligned=queries is keys)
    y_BxKxGxTxH = _attend(sight, q_BxKxGxTxH, k_BxKxSxH, v_BxKxSxH, queries, keys, slopes)
    return rearrange(y_BxKxGxTxH, "b k g t h -> b t (k g) h").astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sight: Sight, q, k, v, queries, keys, slopes):
    """float32 [B, K, G, T, H]."""
    return _forward(sight, q, k, v, queries, keys, slopes)[0]


def _forward(sight: Sight, q, k, v, queries, keys, slopes):
    found = []
    for rows, near in _blocks(sight, q.shape[3]):
        here = q[:, :, :, rows]
        logits_BxKxGxTxS = _logits(sight, here, k[:, :, near], _part(queries, rows), _part(keys, near), slopes)
        highest = logits_BxKxGxTxS.max(-1, keepdims=True)
        p_BxKxGxTxS = jnp.exp(logits_BxKxGxTxS - highest)
        total = p_BxKxGxTxS.sum(-1, keepdims=True)
        y_BxKxGxTxH = _product("bkgts,bksh->bkgth", p_BxKxGxTxS.astype(v.dtype), v[:, :, near])
        found.append((y_BxKxGxTxH / total, Rows(highest, total)))
    y, rows = jax.tree.map(lambda *parts: jnp.concatenate(parts, 3), *found) if len(found) > 1 else found[0]
    return y, (q, k, v, queries, keys, slopes, y, rows)


def _backward(sight: Sight, residuals, dy_BxKxGxTxH):
    q, k, v, queries, keys, slopes, y, of_rows = residuals
    dqs, dk, dv = [], *(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for rows, near in _blocks(sight, q.shape[3]):
        here = q[:, :, :, rows]
        logits_BxKxGxTxS = _logits(sight, here, k[:, :, near], _part(queries, rows), _part(keys, near), slopes)
        dy, highest, total = (x[:, :, :, rows] for x in (dy_BxKxGxTxH, *of_rows))
        p_BxKxGxTxS = jnp.exp(logits_BxKxGxTxS - highest) * (1 / total)
        mean_BxKxGxTx1 = jnp.sum(dy * y[:, :, :, rows], -1, keepdims=True)  # of dp, weighed by p
        dy = dy.astype(v.dtype)
        dp_BxKxGxTxS = _product("bkgth,bksh->bkgts", dy, v[:, :, near])
        dlogits_BxKxGxTxS = (p_BxKxGxTxS * (dp_BxKxGxTxS - mean_BxKxGxTx1)).astype(q.dtype)
        dqs.append(_product("bkgts,bksh->bkgth", dlogits_BxKxGxTxS, k[:, :, near]))
        dk = dk.at[:, :, near].add(_product("bkgts,bkgth->bksh", dlogits_BxKxGxTxS, here))
        dv = dv.at[:, :, near].add(_product("bkgts,bkgth->bksh", p_BxKxGxTxS.astype(v.dtype), dy))
    dq = jnp.concatenate(dqs, 3) if len(dqs) > 1 else dqs[0]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_forward, _backward)


def _blocks(sight: Sight, T: int) -> Iterator[tuple[slice, slice]]:
    """Of T queries, and the keys that each block of them can see."""
    size = max(BLOCK, math.ceil(T / MOST_BLOCKS))
    reach = sight.window if sight.stride is None and not sight.everywhere else None
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        first = 0 if reach is None else max(0, rows.start - reach + 1)
        end = rows.stop if sight.causal else T if reach is None else min(rows.stop + reach - 1, T)
        yield rows, slice(first, end) if sight.aligned else slice(None)


def _part(tokens, rows: slice):
    return type(tokens)(tokens.number[rows], None if tokens.began is None else tokens.began[:, rows])


def _logits(sight: Sight, q, k, queries, keys, slopes):
    """float32 [B, K, G, T, S]; `HIDDEN` where a query does not see a key."""
    logits_BxKxGxTxS = _product("bkgth,bksh->bkgts", q, k)
    if slopes is not None:
        bias = linear_bias(slopes, queries, keys)
        logits_BxKxGxTxS += rearrange(bias, "(k g) t s -> k g t s", g=q.shape[2])
    seen_BxTxS = seen(queries, keys, sight.causal, sight.window, sight.stride, sight.everywhere)
    return jnp.where(seen_BxTxS[:, None, None], logits_BxKxGxTxS, HIDDEN)


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
