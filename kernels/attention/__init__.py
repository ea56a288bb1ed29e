"""Softmax attention with grouped queries, windows, linear biases and packed documents."""

from typing import NamedTuple

import jax

from phyla.kernels.attention.library import attention_library
from phyla.kernels.attention.xla import attention_xla
from phyla.kernels.dispatch import resolve

IMPLEMENTATIONS = {
    "reference": attention_library,
    "cpu": attention_xla,
    "xla": attention_xla,
    "gpu": attention_library,
    "tpu": attention_library,
}


class Tokens(NamedTuple):
    """Where tokens stand: those that ask, or those that are asked."""

    number: jax.Array  # [T] int32, in the sequence; below 0: no token, seen by none
    began: jax.Array | None  # [B, T] int32, with which token its document began; None: one document


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Tokens,
    keys: Tokens,
    *,
    causal: bool = True,
    window: int | None = None,
    stride: int | None = None,
    everywhere: int = 0,
    slopes: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q·k / √H - slope · distance) v over the keys that a query sees (Vaswani et al. 2017, equation 1).

    A query sees the keys of its own document at distance 0 to `window` - 1: backwards only if `causal`, else both
    ways. With a window it may also see every `stride`-th token (Child et al. 2019, arXiv 1904.10509, section 4.3), and
    the first tokens of its document (Beltagy et al. 2020, arXiv 2004.05150, section 3.1). It must see at least one.
    Logits, softmax and sums are float32.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], K dividing N; each key head serves N / K query heads in a row (Ainslie et al. 2023).
        v: [B, S, K, H].
        queries: of the T tokens. If this is the same object as `keys`, tokens are in order, and the keys that lie
            beyond the causal triangle or the window are not computed at all.
        keys: of the S tokens.
        causal: see above.
        window: see above; None: no bound.
        stride: also the keys at distances that it divides; None: no others.
        everywhere: so many tokens, the first of each document, are seen by all, and if not `causal` see all.
        slopes: [N], of linear biases (Press et al. 2022), or None; constants, of which "xla" gives no gradient.
        implementation: "reference" (`jax.nn.dot_product_attention`, also what accelerators use), "xla" (blocks of
            queries, recomputed in the backward pass: what a CPU is fastest with; keeps q, k, v, the output and two
            numbers for each query and head), or None for the backend's best.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    run = resolve("attention", implementation, IMPLEMENTATIONS)
    return run(
        q, k, v, queries, keys, causal=causal, window=window, stride=stride, everywhere=everywhere, slopes=slopes
    )
