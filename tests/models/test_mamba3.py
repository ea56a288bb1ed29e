"""Mamba-3 (SISO) against a float64 transcription of its recurrence, and as it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.weights import materialize

B, T, D = 2, 9, 12


def build(config):
    """The mixer, its parameters in float64 (none at zero or one by luck), and an input."""
    model = ModelConfig(width=D, layers=2, vocab_size=7, pattern=(BlockConfig(mixer=config),))
    graphdef, params = nnx.split(config.build(model, nnx.Rngs(0), 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    return nnx.merge(graphdef, params), weights, rng.standard_normal((B, T, D)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def token_by_token(config, w, x):
    """One head of one token of one sequence at a time; pairs of B and C as complex numbers."""
    x = x.astype(np.float64)
    H, N, G = len(w["D"]), config.state, config.groups
    inner = w["out_proj.weight"].shape[0]
    P, S = inner // H, int(N * config.rotated) // 2
    out = np.zeros((B, T, D))
    for b in range(B):
        h, k_before, v_before = np.zeros((H, P, N)), np.zeros((H, N)), np.zeros((H, P))
        angle = np.zeros((H, S))
        for t in range(T):
            parts = np.split(x[b, t] @ w["in_proj.weight"], np.cumsum([inner, inner, G * N, G * N, H, H, H]))
            z, v, B_t, C_t, dt, rate, mix, theta = parts
            dt = np.log1p(np.exp(dt + w["dt_bias"]))
            A = -np.where(rate >= 0, 1 + rate, 1 / (1 - np.minimum(rate, 0)))
            lam = sigmoid(mix)
            y = np.zeros((H, P))
            for i in range(H):
                angle[i] += np.pi * np.tanh(theta) * dt[i]

                def turned(vector, name, i=i, angle=angle):
                    u = vector.reshape(G, N)[i // (H // G)]
                    u = u / np.sqrt((u**2).mean() + 1e-5) * w[f"{name}_norm.scale"] + w[f"{name}_bias"][i]
                    pairs = (u[0 : 2 * S : 2] + 1j * u[1 : 2 * S : 2]) * np.exp(1j * angle[i])
                    return np.concatenate([np.stack([pairs.real, pairs.imag], -1).reshape(-1), u[2 * S :]])

                k, q, here = turned(B_t, "B"), turned(C_t, "C"), v[i * P : (i + 1) * P]
                alpha = np.exp(dt[i] * A[i])
                h[i] = alpha * h[i] + (1 - lam[i]) * dt[i] * alpha * np.outer(v_before[i], k_before[i])
                h[i] += lam[i] * dt[i] * np.outer(here, k)
                k_before[i], v_before[i] = k, here
                y[i] = h[i] @ q + w["D"][i] * here
            out[b, t] = (y.reshape(-1) * z * sigmoid(z)) @ w["out_proj.weight"]
    return out


@pytest.mark.parametrize(
    "config",
    [Mamba3Config(head_dim=8, state=6), Mamba3Config(head_dim=3, state=4, groups=2, expand=1.5, rotated=1.0)],
    ids=["plain", "other"],
)
def test_it_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], token_by_token(config, weights, x), atol=3e-5)


def test_every_part_of_the_state_begins_anew_with_a_document():
    mixer, _, x = build(Mamba3Config(head_dim=8, state=6))
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 1, 1], [4] * 9])
    y, state = mixer(jnp.asarray(x), mixer.initial_state(B, T), segment_ids)
    alone, state_alone = mixer(jnp.asarray(x[:, 7:]), mixer.initial_state(B, 2))
    np.testing.assert_allclose(y[0, 7:], alone[0], atol=1e-6)
    for name in ("angle", "ssm", "k", "v"):
        np.testing.assert_allclose(getattr(state, name)[0], getattr(state_alone, name)[0], atol=1e-6, err_msg=name)
        assert np.abs(getattr(state, name)[1] - getattr(state_alone, name)[1]).max() > 0.1 or name in ("k", "v")


def test_the_angle_stays_exact_however_far_it_turns():
    """Decoding 4,096 tokens that all turn the same way: a plain sum would lose a digit with every tenfold."""
    mixer, weights, _ = build(Mamba3Config(head_dim=8, state=6))
    length, H, S = 4096, 3, 1
    x = 1 + 0.1 * np.random.default_rng(1).standard_normal((length, 1, 1, D)).astype(np.float32)
    step = lambda state, x: (mixer(x, state)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda x: jax.lax.scan(step, mixer.initial_state(1, length), x))(x)
    projected = x[:, 0, 0].astype(np.float64) @ weights["in_proj.weight"]
    dt = np.log1p(np.exp(projected[:, -3 * H - S : -2 * H - S] + weights["dt_bias"]))
    expected = (np.pi * np.tanh(projected[:, -S:]) * dt).sum(0)
    assert np.abs(expected).max() > 1000
    angle = np.asarray(state.angle)[0, :, 0]
    np.testing.assert_allclose(np.exp(1j * angle), np.exp(1j * expected), atol=1e-3)
    assert np.abs(angle).max() <= np.pi + 1e-6


def test_it_begins_as_published():
    config = Mamba3Config(head_dim=4)
    model = ModelConfig(width=256, layers=4, vocab_size=7, pattern=(BlockConfig(mixer=config),))
    mixer = config.build(model, nnx.Rngs(0), 0)
    for part in (mixer.B_bias, mixer.C_bias, mixer.B_norm.scale, mixer.C_norm.scale, mixer.D):
        assert (part[...] == 1).all()
    dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
    assert 0.9e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.11
    assert mixer.config.angles() == 32
    assert materialize(mixer.in_proj.weight).shape == (256, 2 * 512 + 2 * 128 + 3 * 128 + 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Mamba3Config(state=0), r"mamba3\.state must be at least 1, not 0"),
        (Mamba3Config(expand=0.0), r"mamba3\.expand must give at least one"),
        (Mamba3Config(head_dim=7), r"mamba3\.head_dim 7 does not divide the inner width 24; nearest: (6|8)"),
        (Mamba3Config(head_dim=8, groups=2), r"mamba3\.groups 2 does not divide the number of heads 3; nearest: (1|3)"),
        (Mamba3Config(head_dim=8, rotated=1.5), r"mamba3\.rotated must be at most 1"),
        (Mamba3Config(head_dim=8, rotated=0.0), r"mamba3\.rotated must be at most 1 and leave a pair"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)
