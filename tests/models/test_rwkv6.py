"""RWKV-6 against a float64 transcription of its equations, and as it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.mixers.rwkv6 import RWKV6ChannelConfig, RWKV6Config
from phyla.models.weights import materialize

B, T, D, K = 2, 19, 12, 4
CONFIG = RWKV6Config(head_dim=K, mix_rank=3, decay_rank=5)


def model_of(config, width=D, layers=3, **fields):
    return ModelConfig(width=width, layers=layers, vocab_size=7, pattern=(BlockConfig(mixer=config),), **fields)


def build(config):
    """The layer, its parameters in float64 (none at zero or one by luck), and an input."""
    layer = config.build(model_of(config), nnx.Rngs(0), 1)
    graphdef, params = nnx.split(layer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    return nnx.merge(graphdef, params), weights, rng.standard_normal((B, T, D)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def token_by_token(w, x):
    """One head of one token of one sequence at a time."""
    x = x.astype(np.float64)
    y = np.zeros((B, T, D))
    for b in range(B):
        S = np.zeros((D // K, K, K))
        for t in range(T):
            change = (x[b, t - 1] if t else 0) - x[b, t]
            low = np.tanh((x[b, t] + change * w["mix_x"]) @ w["mix_down.weight"]).reshape(5, 3)
            more = {name: low[i] @ w[f"mix_up.{i}.weight"] for i, name in enumerate("wkvrg")}
            xw, xk, xv, xr, xg = (x[b, t] + change * (w[f"mix_{name}"] + more[name]) for name in "wkvrg")
            r, k, v = xr @ w["receptance.weight"], xk @ w["key.weight"], xv @ w["value.weight"]
            raw = w["time_decay"] + np.tanh(xw @ w["decay_down.weight"]) @ w["decay_up.weight"]
            decay = np.exp(-np.exp(raw))
            out = np.zeros(D)
            for h in range(D // K):
                head = slice(h * K, (h + 1) * K)
                kv = np.outer(k[head], v[head])
                read = r[head] @ (S[h] + w["time_first"][head][:, None] * kv)
                S[h] = decay[head][:, None] * S[h] + kv
                out[head] = (read - read.mean()) / np.sqrt(read.var() + 64e-5)
            gate = xg @ w["gate.weight"]
            out = (out * w["norm_scale"] + w["norm_bias"]) * gate * sigmoid(gate)
            y[b, t] = out @ w["output.weight"]
    return y


def test_time_mixing_equals_its_definition():
    layer, w, x = build(CONFIG)
    np.testing.assert_allclose(layer(jnp.asarray(x))[0], token_by_token(w, x), atol=1e-4)


def test_channel_mixing_is_that_of_rwkv4():
    layer, w, x = build(RWKV6ChannelConfig())
    assert w["key.weight"].shape == (D, 42)
    before = np.concatenate([np.zeros((B, 1, D)), x[:, :-1]], 1)
    xr, xk = (x * w[f"mix_{name}"] + before * (1 - w[f"mix_{name}"]) for name in "rk")
    y = sigmoid(xr @ w["receptance.weight"]) * (np.maximum(xk @ w["key.weight"], 0) ** 2 @ w["value.weight"])
    np.testing.assert_allclose(layer(jnp.asarray(x))[0], y, atol=2e-5)


def test_it_begins_as_published():
    """Values worked out by hand from the formulas of the authors' model, for 5 channels and 3 blocks."""
    config = RWKV6Config(head_dim=5)
    layers = [config.build(model_of(config, 5), nnx.Rngs(0), i) for i in range(3)]
    ramp = np.arange(5) / 5
    for layer, name, expected in ((0, "w", ramp), (1, "v", ramp ** (2 / 3) + 0.15), (2, "g", ramp ** (1 / 6))):
        np.testing.assert_allclose(getattr(layers[layer], f"mix_{name}")[...], 1 - expected, atol=1e-6)
    np.testing.assert_allclose(layers[2].time_decay[...], [-6, -5.6875, -4.75, -3.1875, -1], 1e-5)
    np.testing.assert_allclose(layers[2].time_first[...], [1, 0.85, 0.4, 0.25, 0.1], atol=1e-6)
    np.testing.assert_allclose(layers[1].norm_scale[...], (2 / 3) ** 0.7, 1e-5)
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1), ("output", 0.0)):
        matrix = materialize(getattr(layers[0], name).weight)
        np.testing.assert_allclose(matrix @ matrix.T, gain**2 * np.eye(5), atol=1e-5)
    assert not materialize(layers[0].mix_down.weight).any()
    assert not materialize(layers[0].decay_down.weight).any()
    assert 0.005 < abs(materialize(layers[0].decay_up.weight)).max() <= 0.01
    assert len(layers[0].mix_up) == 5
    channel = RWKV6ChannelConfig().build(model_of(RWKV6ChannelConfig(), 8), nnx.Rngs(0), 1)
    key = materialize(channel.key.weight)
    np.testing.assert_allclose(key @ key.T, np.eye(8), atol=1e-5)


def test_decays_are_finite_however_fast():
    """exp of 100 would be infinite; what decays so fast is gone."""
    layer, _, x = build(CONFIG)
    layer.time_decay.set_value(jnp.full(D, 100.0))

    def loss(layer):
        return jnp.sum(jnp.square(layer(jnp.asarray(x))[0]))

    value, gradient = jax.value_and_grad(loss)(layer)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_state_is_float32_whatever_the_dtype():
    layer, _, x = build(CONFIG)
    y, state = layer(jnp.asarray(x, jnp.bfloat16), layer.initial_state(B, T))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in (state.last, state.wkv)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RWKV6Config(head_dim=5), r"rwkv6\.head_dim 5 does not divide model\.width 12; nearest: (4|6)"),
        (RWKV6Config(head_dim=4, mix_rank=0), r"rwkv6\.mix_rank must be at least 1, not 0"),
        (RWKV6Config(head_dim=4, decay_rank=0), r"rwkv6\.decay_rank must be at least 1, not 0"),
        (RWKV6ChannelConfig(expand=0.0), r"channel\.expand must give at least one hidden channel"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)
