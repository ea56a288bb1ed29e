"""RWKV-4 against a float64 transcription of its equations, and as it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.rwkv import FORMAT
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.weights import materialize

B, T, D = 2, 19, 12


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


def shifted(w, x, b, t, names):
    """Of one token: mixed with the one before it."""
    before = x[b, t - 1] if t else np.zeros(x.shape[2])
    return (x[b, t] * w[f"mix_{name}"] + before * (1 - w[f"mix_{name}"]) for name in names)


@pytest.mark.parametrize("expand", [1.0, 1.5])
def test_time_mixing_equals_its_definition(expand):
    """As sums over all earlier tokens, not as a recurrence."""
    layer, w, x = build(RWKV4Config(expand=expand))
    y = np.zeros((B, T, D))
    for b in range(B):
        rs, ks, vs = [], [], []
        for t in range(T):
            xr, xk, xv = shifted(w, x.astype(np.float64), b, t, "rkv")
            rs.append(sigmoid(xr @ w["receptance.weight"]))
            ks.append(xk @ w["key.weight"])
            vs.append(xv @ w["value.weight"])
            weights = [np.exp(ks[s] - (t - 1 - s) * np.exp(w["time_decay"])) for s in range(t)]
            weights.append(np.exp(w["time_first"] + ks[t]))
            average = sum(a * v for a, v in zip(weights, vs, strict=True)) / sum(weights)
            y[b, t] = (rs[t] * average) @ w["output.weight"]
    np.testing.assert_allclose(layer(jnp.asarray(x))[0], y, atol=2e-5)


def test_channel_mixing_equals_its_definition():
    layer, w, x = build(RWKV4ChannelConfig(expand=2.5))
    y = np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            xr, xk = shifted(w, x.astype(np.float64), b, t, "rk")
            hidden = np.maximum(xk @ w["key.weight"], 0) ** 2
            y[b, t] = sigmoid(xr @ w["receptance.weight"]) * (hidden @ w["value.weight"])
    np.testing.assert_allclose(layer(jnp.asarray(x))[0], y, atol=2e-5)


def test_it_begins_as_published():
    """Values worked out by hand from the formulas of the authors' model, for 5 channels and 3 blocks."""
    layers = [RWKV4Config().build(model_of(RWKV4Config(), 5), nnx.Rngs(0), i) for i in range(3)]
    np.testing.assert_allclose(layers[0].time_decay[...], [-5, -5 + 8 * 0.25**0.7, -5 + 8 * 0.5**0.7, 1.5409, 3], 1e-4)
    np.testing.assert_allclose(layers[2].time_decay[...], [-5, -4.5, -3, -0.5, 3], 1e-5)  # squares, times 8
    np.testing.assert_allclose(layers[1].time_first[...], np.log(0.3) + np.array([0, 0.5, -0.5, 0, 0.5]), 1e-5)
    np.testing.assert_allclose(layers[0].mix_k[...], np.arange(5) / 5, atol=1e-6)
    np.testing.assert_allclose(layers[2].mix_k[...], (np.arange(5) / 5) ** (1 / 3), atol=1e-6)
    np.testing.assert_allclose(layers[1].mix_v[...], (np.arange(5) / 5) ** (2 / 3) + 0.15, atol=1e-6)
    np.testing.assert_allclose(layers[1].mix_r[...], (np.arange(5) / 5) ** (1 / 3), atol=1e-6)
    for name in ("receptance", "key", "output"):
        assert not materialize(getattr(layers[0], name).weight).any()
    value = materialize(layers[0].value.weight)
    np.testing.assert_allclose(value @ value.T, np.eye(5), atol=1e-5)
    assert layers[0].time_decay.get_metadata()["learning_rate"] == 2
    assert layers[0].time_first.get_metadata()["learning_rate"] == 3

    channel = RWKV4ChannelConfig().build(model_of(RWKV4ChannelConfig(), 5), nnx.Rngs(0), 1)
    np.testing.assert_allclose(channel.mix_k[...], (np.arange(5) / 5) ** (2 / 3), atol=1e-6)
    key = materialize(channel.key.weight)
    np.testing.assert_allclose(key @ key.T, 4 * np.eye(5), atol=1e-4)
    assert not materialize(channel.receptance.weight).any()
    assert not materialize(channel.value.weight).any()


def test_one_block_alone_can_be_built():
    layer = RWKV4Config().build(model_of(RWKV4Config(), 1, 1), nnx.Rngs(0), 0)
    assert jnp.isfinite(layer(jnp.ones((1, 3, 1)))[0]).all()


def test_the_state_is_float32_and_the_first_token_its_own_average_whatever_the_dtype():
    layer, w, x = build(RWKV4Config())
    y, state = layer(jnp.asarray(x, jnp.bfloat16), layer.initial_state(B, T))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((state.last, state.wkv))} == {jnp.dtype(jnp.float32)}
    first = np.asarray(x[:, 0], np.float64)
    r, v = sigmoid((first * w["mix_r"]) @ w["receptance.weight"]), (first * w["mix_v"]) @ w["value.weight"]
    np.testing.assert_allclose(y[:, 0].astype(np.float32), (r * v) @ w["output.weight"], atol=0.05)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RWKV4Config(expand=0.0), r"rwkv4\.expand must give at least one inner channel, not 0\.0"),
        (RWKV4ChannelConfig(expand=0.01), r"channel\.expand must give at least one hidden channel, not 0\.01"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)


FLAGS = {"model_type": "rwkv", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2}


def test_the_flags_that_a_checkpoint_may_leave_out():
    model = FORMAT.config(FLAGS)
    block = BlockConfig(mixer=RWKV4Config(), channel=RWKV4ChannelConfig())
    assert model.pattern == (block,)
    assert (model.norm, model.embedding_norm, model.tie_embeddings) == ("layernorm", True, False)
    wide = FORMAT.config(FLAGS | {"attention_hidden_size": 12, "intermediate_size": 20, "tie_word_embeddings": True})
    assert wide.pattern == (BlockConfig(mixer=RWKV4Config(expand=1.5), channel=RWKV4ChannelConfig(expand=2.5)),)
    assert wide.tie_embeddings
    assert FORMAT.config(FORMAT.to_config(wide)) == wide


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"layer_norm_epsilon": 1e-4}, "layer_norm_epsilon is 0.0001; supported: 1e-05"), ({"heads": 3}, "flag heads")],
)
def test_a_flag_that_is_not_understood_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        FORMAT.config(FLAGS | flags)
