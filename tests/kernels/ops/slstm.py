"""sLSTM, head by head and token by token."""

import numpy as np

from phyla.kernels.slstm import slstm
from tests.kernels.ops import Op

H, P = 2, 3


def document(state, i, f, z, o, R, bias):
    c, n, h, m = state
    y = []
    for t in range(len(i)):
        recurrent = [np.stack([h[head] @ R[gate, head] for head in range(H)]) for gate in range(4)]
        i_t, f_t, z_t, o_t = (gate[t] + r + b for gate, r, b in zip((i, f, z, o), recurrent, bias, strict=True))
        decay = m + np.where(f_t.real < 0, f_t, 0) - np.log1p(np.exp(np.where(f_t.real < 0, f_t, -f_t)))
        new = (n == 0) | (decay.real < i_t.real)
        m = np.where(new, i_t, decay)
        keep = np.where(n == 0, 0, np.exp(decay - m))
        write = np.exp(i_t - m)
        c = keep * c + write * np.tanh(z_t)
        n = keep * n + write
        h = c / n / (1 + np.exp(-o_t))
        y.append(h)
    return np.stack(y), (c, n, h, m)


def draw(rng, B, T, wide):
    gates = {
        name: rng.normal(size=(B, T, H, P)) * 10 ** rng.uniform(-3 * wide, 3 * wide, (B, T, H, P)) for name in "ifzo"
    }
    if wide:
        gates["o"] = np.clip(gates["o"], -300, 300)  # numpy's exp overflows beyond
    return gates | {"R": rng.normal(size=(4, H, P, P)) / np.sqrt(P), "bias": rng.normal(size=(4, H, P))}


def draw_state(rng, B):
    n = 1 + rng.exponential(size=(B, H, P))
    c = n * rng.uniform(-1, 1, (B, H, P))
    h = rng.uniform(-1, 1, (B, H, P))
    return c, n, h, rng.normal(size=(B, H, P))


OP = Op(
    call=slstm,
    document=document,
    draw=draw,
    draw_state=draw_state,
    by_token=frozenset("ifzo"),
    output_shape=(H, P),
    loud=frozenset("ifzo"),
    fast=("xla", "tpu", "gpu"),
)
