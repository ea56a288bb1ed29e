"""mLSTM with its exponential input gate, token by token."""

import numpy as np

from phyla.kernels.mlstm import mlstm
from tests.kernels.ops import Op

H, K, V = 2, 3, 5


def larger(a, b):
    """The maximum, by its real part."""
    return np.where(np.real(a) >= np.real(b), a, b)


def log_sigmoid(x):
    return larger(-x, 0) * -1 - np.log1p(np.exp(-x * np.sign(np.real(x))))


def document(state, q, k, v, i, f):
    C, n, m = state
    h = []
    for t in range(len(q)):
        kept = log_sigmoid(f[t]) + m
        m = larger(larger(kept, i[t]), 0 * i[t])
        decay, weight = np.exp(kept - m)[:, None], np.exp(i[t] - m)[:, None]
        C = decay[..., None] * C + (weight * k[t])[..., None] * v[t][:, None]
        n = decay * n + weight * k[t]
        query = q[t] / np.sqrt(K)
        norm = (n * query).sum(-1)
        norm = larger(norm * np.sign(np.real(norm)), np.exp(-m)) + 1e-6
        h.append(np.einsum("hkv,hk->hv", C, query) / norm[:, None])
    return np.stack(h), (C, n, m)


def draw(rng, B, T, wide):
    gate = 30 if wide else 3
    q, k = rng.normal(size=(2, B, T, H, K))
    if wide:  # exp(-m) no longer keeps the normaliser from 0, where h is ill-conditioned: queries find their keys
        q, k = np.abs(q), np.abs(k)
    return {
        "q": q,
        "k": k,
        "v": rng.normal(size=(B, T, H, V)),
        "i": rng.uniform(-gate, gate, (B, T, H)),
        "f": rng.uniform(-gate, gate, (B, T, H)),
    }


def draw_state(rng, B):
    return rng.normal(size=(B, H, K, V)), rng.normal(size=(B, H, K)), rng.uniform(0, 2, (B, H))


OP = Op(
    call=mlstm,
    document=document,
    draw=draw,
    draw_state=draw_state,
    by_token=frozenset({"q", "k", "v", "i", "f"}),
    output_shape=(H, V),
    loud=frozenset({"v"}),
    fast=("xla", "tpu", "gpu"),
)
