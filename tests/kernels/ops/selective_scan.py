"""Mamba-1's scan, token by token."""

import numpy as np

from phyla.kernels.selective_scan import selective_scan
from tests.kernels.ops import Op

D, N = 6, 5


def document(h, x, dt, A, B, C, D):
    y = []
    for t in range(len(x)):
        h = np.exp(dt[t][:, None] * A) * h + np.outer(dt[t] * x[t], B[t])
        y.append(h @ C[t] + D * x[t])
    return np.stack(y), h


def draw(rng, B, T, wide):
    low, high = (-4, 2) if wide else (-2, 0)
    return {
        "x": rng.normal(size=(B, T, D)),
        "dt": 10 ** rng.uniform(low, high, (B, T, D)),
        "A": -(10 ** rng.uniform(low, high + 1, (D, N))),
        "B": rng.normal(size=(B, T, N)),
        "C": rng.normal(size=(B, T, N)),
        "D": rng.normal(size=D),
    }


OP = Op(
    call=selective_scan,
    document=document,
    draw=draw,
    draw_state=lambda rng, B: rng.normal(size=(B, D, N)),
    by_token=frozenset({"x", "dt", "B", "C"}),
    output_shape=(D,),
    loud=frozenset({"x", "B", "C"}),
    fast=("xla", "tpu", "gpu"),
)
