"""RWKV-7's recurrence, token by token."""

import numpy as np

from phyla.kernels.wkv7 import wkv7
from tests.kernels.ops import Op

H, K, V = 2, 6, 5


def document(S, r, log_w, k, v, a, b):
    y = []
    for t in range(len(r)):
        removed = np.einsum("hvk,hk->hv", S, a[t])
        S = S * np.exp(log_w[t])[:, None, :]
        S = S + removed[:, :, None] * b[t][:, None, :] + v[t][:, :, None] * k[t][:, None, :]
        y.append(np.einsum("hvk,hk->hv", S, r[t]))
    return np.stack(y), S


def draw(rng, B, T, wide):
    """As RWKV-7 calls it, but for the range of the decay: all that is documented if wide."""
    keys = rng.normal(size=(B, T, H, K))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    size = 10 ** rng.uniform(-3 * wide, 3 * wide, (4, B, T, H, 1))
    slowest, fastest = (-6, np.log10(2)) if wide else (-2, np.log10(0.607))
    return {
        "r": rng.normal(size=(B, T, H, K)) * size[0],
        "log_w": -(10 ** rng.uniform(slowest, fastest, (B, T, H, K))),
        "k": rng.normal(size=(B, T, H, K)) * size[1],
        "v": rng.normal(size=(B, T, H, V)) * size[2],
        "a": -keys,
        "b": keys * rng.uniform(size=(B, T, H, K)) * np.minimum(size[3], 1),
    }


OP = Op(
    call=wkv7,
    document=document,
    draw=draw,
    draw_state=lambda rng, B: rng.normal(size=(B, H, V, K)),
    by_token=frozenset({"r", "log_w", "k", "v", "a", "b"}),
    output_shape=(H, V),
    loud=frozenset({"v"}),
    fast=("xla", "tpu", "gpu"),
)
