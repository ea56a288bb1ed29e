"""RWKV-4's average, token by token."""

import numpy as np

from phyla.kernels.wkv4 import wkv4
from tests.kernels.ops import Op

D = 6


def maximum(a, b):
    return np.where(a.real >= b.real, a, b)


def document(state, k, v, w, u):
    aa, bb, pp = state
    pp = np.where(bb == 0, -1e38, pp)
    y = []
    for t in range(len(k)):
        p = maximum(pp, u + k[t])
        past, present = np.exp(pp - p), np.exp(u + k[t] - p)
        y.append((past * aa + present * v[t]) / (past * bb + present))
        p = maximum(pp + w, k[t])
        past, present = np.exp(pp + w - p), np.exp(k[t] - p)
        aa, bb, pp = past * aa + present * v[t], past * bb + present, p
    return np.stack(y), (aa, bb, pp)


def draw(rng, B, T, wide):
    return {
        "k": rng.uniform(-30, 30, (B, T, D)) if wide else 2 * rng.normal(size=(B, T, D)),
        "v": rng.normal(size=(B, T, D)) * 10 ** rng.uniform(-3 * wide, 3 * wide, (B, T, D)),
        "w": -(10 ** rng.uniform(-4, 2, D) if wide else 10 ** rng.uniform(-2, 1, D)),
        "u": rng.uniform(-30, 30, D) if wide else rng.normal(size=D),
    }


def draw_state(rng, B):
    return rng.normal(size=(B, D)), rng.uniform(1, 4, (B, D)), rng.normal(size=(B, D))


OP = Op(
    call=wkv4,
    document=document,
    draw=draw,
    draw_state=draw_state,
    by_token=frozenset({"k", "v"}),
    output_shape=(D,),
    loud=frozenset({"k", "v"}),
)
