"""The mLSTM mixer and the mLSTM block against their definitions, and how they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from phyla.models.weights import materialize

B, T, D = 2, 9, 12


def model_of(config: LayerConfig, **fields) -> ModelConfig:
    return ModelConfig(**{"width": D, "layers": 2, "pattern": (BlockConfig(mixer=config),)} | fields)


def build(config: LayerConfig):
    """The mixer, its parameters in float64 (none at zero or one), and an input."""
    mixer = config.build(model_of(config), nnx.Rngs(0), 1)
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    return nnx.merge(graphdef, params), weights, x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def remember(config, q, k, v, i, f) -> np.ndarray:
    """One row, one head at a time, without a stabiliser: the numbers here are small. [T, heads × V]."""
    H = config.heads
    q, k, v = (a.reshape(T, H, -1) for a in (q, k, v))
    h = np.zeros(v.shape)
    for j in range(H):
        C, n = np.zeros((k.shape[2], v.shape[2])), np.zeros(k.shape[2])
        for t in range(T):
            write = np.exp(i[t, j]) if config.gate == "exponential" else sigmoid(i[t, j])
            C = sigmoid(f[t, j]) * C + write * np.outer(k[t, j], v[t, j])
            n = sigmoid(f[t, j]) * n + write * k[t, j]
            query = q[t, j] / np.sqrt(k.shape[2])
            norm = max(abs(n @ query), 1) if config.gate == "exponential" else 1
            h[t, j] = query @ C / norm
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return h.reshape(T, -1)


def mlstm(config: MLSTMConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """Row by row (Beck et al. 2025, section 2)."""
    out = np.zeros((B, T, D))
    for b in range(B):
        q, k, v, o, i, f = (x[b] @ w[f"{name}.weight"] for name in ("q", "k", "v", "o_gate", "i_gate", "f_gate"))
        i, f = i + w["i_bias"], f + w["f_bias"]
        if config.gate_cap is not None:
            i, f = (config.gate_cap * np.tanh(gate / config.gate_cap) for gate in (i, f))
        h = remember(config, q, k, v, i, f) * w["norm.scale"]
        out[b] = (sigmoid(o) * h) @ w["out.weight"]
    return out


def block_diagonal(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    blocks = np.split(x, len(w[f"{name}.weight"]), axis=-1)
    mapped = [part @ block for part, block in zip(blocks, w[f"{name}.weight"], strict=True)]
    return np.concatenate(mapped, -1) + w.get(f"{name}.bias", 0)


def mlstm_block(config: MLSTMBlockConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """Row by row (Beck et al. 2024, figure 11)."""
    out = np.zeros((B, T, D))
    for b in range(B):
        u, z = np.split(x[b] @ w["up.weight"] + w.get("up.bias", 0), 2, axis=-1)
        past = np.concatenate([np.zeros((config.conv - 1, u.shape[1])), u])
        c = sum(past[j : j + T] * w["conv_weight"][j] for j in range(config.conv)) + w["conv_bias"]
        c = c * sigmoid(c)
        q, k, v = block_diagonal(c, w, "q"), block_diagonal(c, w, "k"), block_diagonal(u, w, "v")
        i, f = (np.concatenate([q, k, v], -1) @ w[f"{name}_gate.weight"] + w[f"{name}_bias"] for name in "if")
        h = remember(config, q, k, v, i, f) * w["norm.scale"] + w["skip"] * c
        out[b] = (h * z * sigmoid(z)) @ w["down.weight"] + w.get("down.bias", 0)
    return out


@pytest.mark.parametrize(
    "config",
    [
        MLSTMConfig(heads=2, input_bias=1.0),
        MLSTMConfig(heads=3, input_bias=3.0, gate_cap=2.0, qk_expand=1.0, v_expand=0.5),
        MLSTMConfig(heads=1, input_bias=0.0, gate_cap=None, gate="sigmoid"),
    ],
)
def test_mlstm_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], mlstm(config, weights, x.astype(float)), atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        MLSTMBlockConfig(),
        MLSTMBlockConfig(heads=3, expand=1.5, conv=2, projection=6, input_bias=2.0, bias=True),
        MLSTMBlockConfig(heads=2, gate="sigmoid"),
    ],
)
def test_the_block_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], mlstm_block(config, weights, x.astype(float)), atol=5e-5)


def test_the_mixer_begins_as_published():
    config = MLSTMConfig(heads=4)
    mixer = config.build(model_of(config, width=256, layers=8), nnx.Rngs(0), 0)
    assert mixer.memory_shape == (4, 32, 64)
    np.testing.assert_allclose(mixer.f_bias[...], [3, 4, 5, 6])
    assert (mixer.i_bias[...] == -10).all()
    for gate in (mixer.i_gate, mixer.f_gate):
        assert not materialize(gate.weight).any()
    for layer in (mixer.q, mixer.k, mixer.v, mixer.o_gate):
        np.testing.assert_allclose(np.std(materialize(layer.weight)), (2 / (5 * 256)) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(np.std(materialize(mixer.out.weight)), 2 / 8 / 16, rtol=0.02)


def test_the_block_begins_as_published():
    config = MLSTMBlockConfig()
    mixer = config.build(model_of(config, width=256, layers=8), nnx.Rngs(0), 0)
    np.testing.assert_allclose(mixer.f_bias[...], [3, 4, 5, 6])
    assert 0 < np.abs(mixer.i_bias[...]).max() < 0.5  # normal, 0.1
    assert (mixer.skip[...] == 1).all()
    for gate in (mixer.i_gate, mixer.f_gate):
        assert not materialize(gate.weight).any()
    assert materialize(mixer.q.weight).shape == (128, 4, 4)
    for layer in (mixer.up, mixer.q, mixer.k, mixer.v):
        np.testing.assert_allclose(np.std(materialize(layer.weight)), (2 / (5 * 256)) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(materialize(mixer.down.weight)), 2 / 8 / 16, rtol=0.02)
    for taps in (mixer.conv_weight, mixer.conv_bias):  # uniform on ± 1/√4
        assert 0.48 < np.abs(taps[...]).max() <= 0.5


@pytest.mark.parametrize("config", [MLSTMConfig(heads=2, gate_cap=None), MLSTMBlockConfig(heads=2)])
def test_gates_and_memory_are_float32_whatever_the_dtype(config):
    """Without input the memory only decays, by the forget gates' biases."""
    mixer = config.build(model_of(config, dtype="bfloat16"), nnx.Rngs(0), 0)
    before = mixer.initial_state(1, T)
    C, n, m = before.memory
    before = before._replace(memory=(C + 1, n + 1, m + 2))
    if isinstance(mixer.config, MLSTMBlockConfig):
        mixer.conv_bias[...] = jnp.zeros_like(mixer.conv_bias[...])
    _, after = mixer(jnp.zeros((1, T, D), jnp.bfloat16), before)
    C, n, m = after.memory
    assert {leaf.dtype for leaf in after.memory} == {jnp.dtype(jnp.float32)}
    decay = sigmoid(np.linspace(3, 6, 2)) ** T * np.exp(2)  # C and n are those of exp(m)
    np.testing.assert_allclose((C * jnp.exp(m)[..., None, None])[0, :, 0, 0], decay, rtol=1e-5)
    np.testing.assert_allclose((n * jnp.exp(m)[..., None])[0, :, 0], decay, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MLSTMConfig(heads=4), r"mlstm\.heads 4 does not divide the width of mlstm\.qk_expand 6; nearest: (3|6)"),
        (MLSTMConfig(heads=2, v_expand=0.01), r"the width of mlstm\.v_expand must be at least 1, not 0"),
        (MLSTMConfig(heads=2, gate_cap=0.0), r"mlstm\.gate_cap must be positive, not 0"),
        (MLSTMBlockConfig(conv=0), r"mlstm_block\.conv must be at least 1, not 0"),
        (MLSTMBlockConfig(heads=5), r"mlstm_block\.heads 5 does not divide the inner width 24; nearest: (4|6)"),
        (MLSTMBlockConfig(projection=7), r"mlstm_block\.projection 7 does not divide the inner width 24; nearest: "),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)
