"""mLSTM with the sigmoid input gate and no normaliser, token by token."""

import functools

import numpy as np

from phyla.kernels.mlstm import mlstm
from tests.kernels.ops import Op
from tests.kernels.ops.mlstm import H, K, V, draw


def document(state, q, k, v, i, f):
    (C,) = state
    h = []
    for t in range(len(q)):
        forget, write = 1 / (1 + np.exp(-f[t])), 1 / (1 + np.exp(-i[t]))
        C = forget[:, None, None] * C + (write[:, None] * k[t])[..., None] * v[t][:, None]
        h.append(np.einsum("hkv,hk->hv", C, q[t]) / np.sqrt(K))
    return np.stack(h), (C,)


OP = Op(
    call=functools.partial(mlstm, gate="sigmoid"),
    document=document,
    draw=draw,
    draw_state=lambda rng, B: (rng.normal(size=(B, H, K, V)),),
    by_token=frozenset({"q", "k", "v", "i", "f"}),
    output_shape=(H, V),
    loud=frozenset({"v"}),
    fast=("xla", "tpu", "gpu"),
)
