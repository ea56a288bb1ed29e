"""RWKV-6's linear attention, token by token."""

import numpy as np

from phyla.kernels.wkv6 import wkv6
from tests.kernels.ops import Op

H, K, V = 2, 3, 5


def document(S, r, w, k, v, u):
    y = []
    for t in range(len(r)):
        kv = k[t][:, :, None] * v[t][:, None, :]
        y.append(np.einsum("hk,hkv->hv", r[t], S + u[:, :, None] * kv))
        S = np.exp(w[t])[:, :, None] * S + kv
    return np.stack(y), S


def draw(rng, B, T, wide):
    return {
        "r": rng.normal(size=(B, T, H, K)),
        "w": -(10 ** (rng.uniform(-4, 2, (B, T, H, K)) if wide else rng.uniform(-2, 1, (B, T, H, K)))),
        "k": rng.normal(size=(B, T, H, K)),
        "v": rng.normal(size=(B, T, H, V)),
        "u": rng.normal(size=(H, K)),
    }


OP = Op(
    call=wkv6,
    document=document,
    draw=draw,
    draw_state=lambda rng, B: rng.normal(size=(B, H, K, V)),
    by_token=frozenset({"r", "w", "k", "v"}),
    output_shape=(H, V),
    loud=frozenset({"k", "r", "v"}),
)
