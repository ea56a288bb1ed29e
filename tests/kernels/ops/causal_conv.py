"""The causal convolution, window by window."""

import numpy as np

from phyla.kernels.causal_conv import causal_conv
from tests.kernels.ops import Op

D, W = 6, 4


def document(state, x, weight, bias):
    inputs = np.concatenate([state, x])
    windows = np.lib.stride_tricks.sliding_window_view(inputs, W, axis=0)  # [T, D, W]
    return np.einsum("tdw,wd->td", windows, weight) + bias, inputs[len(x) :]


def draw(rng, B, T, wide):
    x = rng.normal(size=(B, T, D)) * 10 ** rng.uniform(-3 * wide, 3 * wide, (B, T, D))
    return {"x": x, "weight": rng.normal(size=(W, D)), "bias": rng.normal(size=D)}


OP = Op(
    call=causal_conv,
    document=document,
    draw=draw,
    draw_state=lambda rng, B: rng.normal(size=(B, W - 1, D)),
    by_token=frozenset({"x"}),
    output_shape=(D,),
    loud=frozenset({"x"}),
)
