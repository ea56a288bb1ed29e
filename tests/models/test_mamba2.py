"""Mamba-2 against a float64 transcription of its equations, and as it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.mixers.mamba2 import Mamba2Config

B, T, D = 2, 9, 12


def model_of(config, width=D, **fields):
    return ModelConfig(
        **{"width": width, "layers": 2, "vocab_size": 7, "pattern": (BlockConfig(mixer=config),)} | fields
    )


def build(config):
    """The mixer, its parameters in float64 (none at zero or one by luck), and an input."""
    graphdef, params = nnx.split(config.build(model_of(config), nnx.Rngs(0), 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    return nnx.merge(graphdef, params), weights, rng.standard_normal((B, T, D)).astype(np.float32)


def silu(a):
    return a / (1 + np.exp(-a))


def token_by_token(config, w, x):
    """One head of one token of one sequence at a time."""
    x = x.astype(np.float64)
    H, inner = len(w["D"]), len(w["norm.scale"])
    P, N, G = inner // H, config.state, config.groups
    projected = x @ w["in_proj.weight"] + w.get("in_proj.bias", 0)
    out = np.zeros((B, T, D))
    for b in range(B):
        h = np.zeros((H, P, N))
        for t in range(T):
            z, dt = projected[b, t, :inner], np.log1p(np.exp(projected[b, t, -H:] + w["dt_bias"]))
            least, greatest = config.dt_limit or (0, np.inf)
            dt = np.clip(dt, least, greatest)
            taps = [w["conv_weight"][-1 - i] * projected[b, t - i, inner:-H] for i in range(min(config.conv, t + 1))]
            c = silu(sum(taps) + w.get("conv_bias", 0))
            inputs, B_t, C_t = c[:inner], c[inner : inner + G * N], c[inner + G * N :]
            y = np.zeros(inner)
            for i in range(H):
                here, group = slice(i * P, i * P + P), slice(i // (H // G) * N, (i // (H // G) + 1) * N)
                h[i] = np.exp(-np.exp(w["A_log"][i]) * dt[i]) * h[i] + dt[i] * np.outer(inputs[here], B_t[group])
                y[here] = h[i] @ C_t[group] + w["D"][i] * inputs[here]
            y = (y * silu(z)).reshape(G, -1)  # the gate first, then the norm
            y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5)
            out[b, t] = (y.reshape(-1) * w["norm.scale"]) @ w["out_proj.weight"] + w.get("out_proj.bias", 0)
    return out


@pytest.mark.parametrize(
    "config",
    [
        Mamba2Config(head_dim=8, state=5),
        Mamba2Config(
            head_dim=3, state=4, groups=2, conv=2, expand=1.5, bias=True, conv_bias=False, dt_limit=(0.3, 0.9)
        ),
    ],
    ids=["plain", "other"],
)
def test_it_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], token_by_token(config, weights, x), atol=2e-5)


def test_it_begins_as_published():
    model = model_of(Mamba2Config(head_dim=4), width=256, layers=4)
    mixer = Mamba2Config(head_dim=4).build(model, nnx.Rngs(0), 0)
    A = np.exp(mixer.A_log[...])
    assert A.shape == (128,)
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16
    assert abs(A.mean() - 8.5) < 1
    assert (mixer.D[...] == 1).all()
    assert (mixer.norm.scale[...] == 1).all()
    dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
    assert 0.9e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.11
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.25  # log-uniform on [1e-3, 0.1]


def test_mamba2_130m_has_its_published_size():
    """128,989,632: state-spaces/mamba2-130m, with its vocabulary of 50,277 padded to 50,288."""
    assert sizes.count(model_of(Mamba2Config(), width=768, layers=24, vocab_size=50_288)) == 128_989_632


def test_operations_by_hand():
    inner, H, G, N, taps = 2 * D, 2, 2, 5, 4
    matrices = D * (2 * inner + 2 * G * N + H) + inner * D
    layer = 2 * matrices + 2 * taps * (inner + 2 * G * N) + 5 * inner * N
    config = Mamba2Config(head_dim=inner // H, state=N, groups=G)
    assert sizes.flops_per_token(model_of(config), 64) == 2 * layer + 2 * 7 * D


def test_the_step_size_and_the_state_are_float32_whatever_the_dtype():
    """Without input the state only decays, by exp(dt A) a token, with dt the softplus of its bias."""
    config = Mamba2Config(head_dim=8, state=3)
    mixer = config.build(model_of(config, dtype="bfloat16"), nnx.Rngs(0), 0)
    assert mixer.conv_bias is not None
    mixer.conv_bias[...] = jnp.zeros_like(mixer.conv_bias[...])
    before = mixer.initial_state(1, T)
    _, after = mixer(jnp.zeros((1, T, D), jnp.bfloat16), before._replace(ssm=jnp.ones_like(before.ssm)))
    dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
    expected = np.exp(-T * dt * np.exp(np.asarray(mixer.A_log[...], np.float64)))
    assert after is not None
    assert after.ssm.dtype == jnp.float32
    np.testing.assert_allclose(after.ssm[0], np.broadcast_to(expected[:, None, None], (3, 8, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Mamba2Config(state=0), r"mamba2\.state must be at least 1, not 0"),
        (Mamba2Config(expand=0.0), r"mamba2\.expand must give at least one"),
        (Mamba2Config(head_dim=7), r"mamba2\.head_dim 7 does not divide the inner width 24; nearest: (6|8)"),
        (Mamba2Config(head_dim=8, groups=2), r"mamba2\.groups 2 does not divide the number of heads 3; nearest: (1|3)"),
        (Mamba2Config(head_dim=8, dt_limit=(0.5, 0.1)), r"mamba2\.dt_limit must be two step sizes"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)
