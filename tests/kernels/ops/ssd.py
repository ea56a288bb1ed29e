"""Mamba-2's recurrence, token by token and head by head."""

import numpy as np

from phyla.kernels.ssd import ssd
from tests.kernels.ops import Op

H, P, G, N = 4, 3, 2, 5


def document(h, x, dt, A, B, C, D):
    y = []
    for t in range(len(x)):
        h = np.stack([np.exp(dt[t, i] * A[i]) * h[i] + np.outer(dt[t, i] * x[t, i], B[t, i // 2]) for i in range(H)])
        y.append(np.stack([h[i] @ C[t, i // 2] + D[i] * x[t, i] for i in range(H)]))
    return np.stack(y), h


def draw(rng, B, T, wide):
    low, high = (-4, 2) if wide else (-2, 0)
    return {
        "x": rng.normal(size=(B, T, H, P)),
        "dt": 10 ** rng.uniform(low, high, (B, T, H)),
        "A": -(10 ** rng.uniform(low, high + 1, H)),
        "B": rng.normal(size=(B, T, G, N)),
        "C": rng.normal(size=(B, T, G, N)),
        "D": rng.normal(size=H),
    }


OP = Op(
    call=ssd,
    document=document,
    draw=draw,
    draw_state=lambda rng, B: rng.normal(size=(B, H, P, N)),
    by_token=frozenset({"x", "dt", "B", "C"}),
    output_shape=(H, P),
    loud=frozenset({"x"}),
    fast=("xla", "tpu", "gpu"),
)
