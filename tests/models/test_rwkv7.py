"""RWKV-7 against a float64 transcription of its equations, and as it begins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats import open_source
from phyla.models.formats.folder import write_folder
from phyla.models.formats.rwkv7 import FORMAT
from phyla.models.formats.source import build as build_model
from phyla.models.formats.source import from_state, parameter_shapes
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.weights import materialize

B, T, D, K = 2, 19, 12, 4
CONFIG = RWKV7Config(head_dim=K, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6)


def model_of(config, width=D, layers=3, **fields):
    return ModelConfig(width=width, layers=layers, vocab_size=7, pattern=(BlockConfig(mixer=config),), **fields)


def build(config):
    """The layer, its parameters in float64 (none at zero or one by luck), an input and a value."""
    layer = config.build(model_of(config), nnx.Rngs(0), 1)
    graphdef, params = nnx.split(layer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    x, value = rng.standard_normal((2, B, T, D)).astype(np.float32)
    return nnx.merge(graphdef, params), weights, x, value


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def token_by_token(w, x, first_value):
    """One head of one token of one sequence at a time; returns y and the values before the residual."""
    x = x.astype(np.float64)
    y, values = np.zeros((2, B, T, D))
    for b in range(B):
        S = np.zeros((D // K, K, K))
        for t in range(T):
            before = x[b, t - 1] if t else np.zeros(D)
            xr, xw, xk, xv, xa, xg = (x[b, t] + (before - x[b, t]) * w[f"x_{n}"] for n in "rwkvag")
            r, k, v = xr @ w["receptance.weight"], xk @ w["key.weight"], xv @ w["value.weight"]
            values[b, t] = v
            low = lambda n, x, f=lambda x: x: f(x @ w[f"{n}.down.weight"]) @ w[f"{n}.up.weight"]  # noqa: E731
            decay = np.exp(-np.exp(-0.5) * sigmoid(w["w0"] + low("w", xw, np.tanh)))
            rate = sigmoid(w["a0"] + low("a", xa))
            if "v0" in w:
                v = v + (first_value[b, t] - v) * sigmoid(w["v0"] + low("v", xv))
            kappa, new = k * w["k_k"], k * (1 + (rate - 1) * w["k_a"])
            out = np.zeros(D)
            for h in range(D // K):
                here = slice(h * K, h * K + K)
                unit = kappa[here] / np.linalg.norm(kappa[here])
                S[h] = (
                    S[h] @ np.diag(decay[here])
                    - np.outer(S[h] @ unit, unit * rate[here])
                    + np.outer(v[here], new[here])
                )
                read = S[h] @ r[here]
                read = (read - read.mean()) / np.sqrt(read.var() + 64e-5) * w["norm_scale"][here] + w["norm_bias"][here]
                out[here] = read + (r[here] * new[here] * w["r_k"][here]).sum() * v[here]
            y[b, t] = (out * low("g", xg, sigmoid) @ np.eye(D)) @ w["output.weight"]
    return y, values


@pytest.mark.parametrize("residual", [True, False])
def test_time_mixing_equals_its_definition(residual):
    mixer, w, x, value = build(dataclasses.replace(CONFIG, value_residual=residual))
    expected, values = token_by_token(w, x, value)
    found, state, shared = mixer(jnp.asarray(x), None, None, jnp.asarray(value) if residual else None)
    assert state is None
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(shared, value if residual else values, atol=2e-5)


def test_channel_mixing_equals_its_definition():
    channel, w, x, _ = build(RWKV7ChannelConfig(expand=2.5))
    before = np.concatenate([np.zeros((B, 1, D)), x[:, :-1]], axis=1)
    hidden = np.maximum((x + (before - x) * w["x_k"]) @ w["key.weight"], 0) ** 2
    assert hidden.shape[-1] == 30
    np.testing.assert_allclose(channel(jnp.asarray(x))[0], hidden @ w["value.weight"], atol=2e-5)


def test_states_are_float32_whatever_the_dtype():
    """The decay is too: with no input, the state only decays, by what w0 says."""
    mixer = CONFIG.build(model_of(CONFIG, dtype="bfloat16"), nnx.Rngs(0), 1)
    before = mixer.initial_state(1, T)
    zero = jnp.zeros((1, T, D), jnp.bfloat16)
    _, after, _ = mixer(zero, before._replace(wkv=jnp.ones_like(before.wkv)), None, zero)
    log_w = -np.exp(-0.5) * sigmoid(np.asarray(mixer.w0[...], np.float64))
    assert after is not None
    expected = np.broadcast_to(np.exp(T * log_w).reshape(1, D // K, 1, K), after.wkv.shape)
    assert after.wkv.dtype == after.last.dtype == jnp.float32
    np.testing.assert_allclose(after.wkv, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_begins_as_published(layer):
    D, layers, K = 256, 3, 64
    config = RWKV7Config()
    mixer = jax.jit(lambda i: config.build(model_of(config, D, layers), nnx.Rngs(0), i))(layer)
    get = lambda name: np.asarray(getattr(mixer, name)[...], np.float64)  # noqa: E731
    n = np.arange(D)
    linear, head = n / (D - 1) - 0.5, (n % K - 31.5) / 31.5
    zigzag = head * abs(head)
    depth, ahead = layer / (layers - 1), 1 - layer / layers
    for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
        np.testing.assert_allclose(get(f"x_{name}"), 1 - (n / D) ** (power * ahead), atol=1e-5)
    w0 = -6 + 6 * (n / (D - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
    np.testing.assert_allclose(get("w0"), w0, atol=1e-5)
    np.testing.assert_allclose(get("a0"), -0.19 + 0.3 * zigzag + 0.4 * linear, atol=1e-6)
    np.testing.assert_allclose(get("v0"), 0.73 - 0.4 * linear, atol=1e-6)
    np.testing.assert_allclose(get("k_k"), 0.71 - 0.1 * linear, atol=1e-6)
    np.testing.assert_allclose(get("k_a"), 1.02, atol=1e-6)
    np.testing.assert_allclose(get("r_k"), -0.04, atol=1e-6)
    np.testing.assert_allclose(get("norm_scale"), ((1 + layer) / layers) ** 0.7, atol=1e-6)
    for name, rank in {"w": 32, "a": 32, "v": 32, "g": 64}.items():
        down, up = (
            np.asarray(materialize(part.weight)) for part in (getattr(mixer, name).down, getattr(mixer, name).up)
        )
        assert down.shape == (D, rank)
        assert not down.any()
        np.testing.assert_allclose(up @ up.T, 0.01 * np.eye(rank), atol=1e-6)
    for name, bound in {"receptance": 0.5, "key": 0.05, "value": 0.5, "output": 0}.items():
        largest = np.abs(materialize(getattr(mixer, name).weight)).max()
        assert 0.99 * bound <= largest * D**0.5 <= bound, name
    channel = RWKV7ChannelConfig().build(model_of(config, D, layers), nnx.Rngs(0), layer)
    np.testing.assert_allclose(channel.x_k[...], 1 - (n / D) ** ahead**4, atol=1e-5)
    assert 0.495 <= np.abs(materialize(channel.key.weight)).max() * D**0.5 <= 0.5
    assert not np.any(materialize(channel.value.weight))


def test_only_matrices_decay_and_w0_learns_twice_as_fast():
    mixer = CONFIG.build(model_of(CONFIG), nnx.Rngs(0), 0)
    for path, parameter in nnx.to_flat_state(nnx.state(mixer)):
        known = parameter.get_metadata()
        assert known["weight_decay"] == (path[-1] == "weight"), path
        assert known["learning_rate"] == (2.0 if path == ("w0",) else 1.0), path


def test_the_ranks_are_those_that_the_authors_suggest():
    ranks = [list(RWKV7Config().ranks(model_of(CONFIG, width)).values()) for width in (768, 2048)]
    assert ranks == [[64, 64, 32, 128], [128, 128, 64, 224]]


def test_a_residual_without_a_value_is_refused():
    with pytest.raises(UserError, match=r"rwkv7\.value_residual must be false in the first rwkv7 block"):
        LanguageModel(model_of(CONFIG), nnx.Rngs(0))(jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RWKV7Config(head_dim=5), r"rwkv7\.head_dim 5 does not divide model\.width 12; nearest: (4|6)"),
        (dataclasses.replace(CONFIG, gate_rank=0), r"rwkv7\.gate_rank must be at least 1, not 0"),
        (RWKV7ChannelConfig(expand=0.0), r"rwkv7_channel\.expand must give at least one"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        config.build(model_of(config), nnx.Rngs(0), 0)


@pytest.mark.parametrize("surplus", [False, True])
def test_a_checkpoint_is_read_as_it_was_written(tmp_path, surplus):
    """And its configuration can be left out, for its tensors say it all."""
    first = BlockConfig(mixer=dataclasses.replace(CONFIG, value_residual=False), channel=RWKV7ChannelConfig(expand=2.5))
    other = BlockConfig(mixer=CONFIG, channel=first.channel)
    fields = {"norm": "layernorm", "embedding_norm": True, "tie_embeddings": False}
    model = ModelConfig(width=D, layers=3, vocab_size=7, prefix=(first,), pattern=(other,), **fields)
    rng = np.random.default_rng(0)
    written = {name: rng.standard_normal(s).astype(np.float32) for name, s in parameter_shapes(model).items()}
    write_folder(tmp_path / "model", FORMAT, model, written)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "rwkv7-reference"}')
    if surplus:
        file = tmp_path / "model" / "model.safetensors"
        save_file(load_file(file) | {f"blocks.0.att.v{i}": np.ones(3, np.float32) for i in range(3)}, file)
    source = open_source(tmp_path / "model")
    assert source.model == model
    read = from_state(build_model(source)[1])
    assert read.keys() == written.keys()
    for name in written:
        np.testing.assert_array_equal(read[name], written[name])
