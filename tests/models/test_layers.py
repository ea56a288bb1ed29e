"""Layers against float64, and weight objects in the place of arrays."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.language_model import LanguageModel
from phyla.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import ACTIVATIONS, GatedMLPConfig, MLPConfig
from phyla.models.weights import Weight, dense_matmul, materialize, parameter


class Scaled(Weight):
    """A matrix as int8 codes and a scale for each column: the simplest compressed weight."""

    def __init__(self, dense: jax.Array):
        self.scale = nnx.Param(jnp.abs(dense).max(0) / 127)
        self.codes = nnx.Variable(jnp.round(dense / self.scale[...]).astype(jnp.int8))

    def matmul(self, x: jax.Array) -> jax.Array:
        return (x @ self.codes[...].astype(x.dtype)) * self.scale[...].astype(x.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def materialize(self) -> jax.Array:
        return self.codes[...] * self.scale[...]


def test_a_compressed_model_is_the_same_model_with_other_weights():
    """Swapped by path in a scanned hybrid; runs, and trains what is trainable."""
    pattern = (
        BlockConfig(mixer=AttentionConfig(heads=2), channel=GatedMLPConfig()),
        BlockConfig(mixer=MambaConfig(state=4)),
    )
    config = ModelConfig(width=16, layers=4, vocab_size=31, pattern=pattern)
    model = LanguageModel(config, nnx.Rngs(0))
    tokens = jnp.arange(12).reshape(2, 6)
    before = model.logits(model(tokens)[0])
    swapped = 0
    for _, module in nnx.iter_modules(model.periods):
        if isinstance(module, Linear):
            module.weight = jax.vmap(Scaled)(materialize(module.weight))
            swapped += 1
    model.embedding.weight = Scaled(materialize(model.embedding.weight))
    assert swapped == 4 + 3 + 4
    after = jax.jit(lambda model: model.logits(model(tokens)[0]))(model)
    error = jnp.abs(after - before).max() / jnp.abs(before).max()
    assert 0 < error < 0.1  # int8's rounding, and no more

    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(nnx.merge(graphdef, p, rest)(tokens)[0])))(trainable)
    scales = [g for path, g in nnx.to_flat_state(gradient) if path[-1] == "scale" and path[-2] == "weight"]
    assert len(scales) == swapped + 1
    assert all(jnp.abs(g[...]).max() > 0 for g in scales)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matmul_and_its_gradients(dtype):
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s) for s in ((2, 3, 5), (5, 4), (2, 3, 4)))
    y, pullback = jax.vjp(dense_matmul, jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32))
    dx, dw = pullback(jnp.asarray(g, dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, "float32")
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(y.astype(float), x @ w, atol=tolerance)
    np.testing.assert_allclose(dx.astype(float), g @ w.T, atol=tolerance)
    np.testing.assert_allclose(dw, np.einsum("bti,bto->io", x, g), atol=tolerance)


def test_linear_and_embedding():
    rngs = nnx.Rngs(0)
    linear = Linear((5, 4), ("embed", "mlp"), rngs, bias=True)
    assert linear.bias is not None
    linear.bias[...] = jnp.arange(4.0)
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    np.testing.assert_allclose(
        linear(jnp.asarray(x)), x @ materialize(linear.weight) + np.arange(4), rtol=1e-5, atol=1e-6
    )
    assert abs(np.std(materialize(Linear((400, 400), ("a", "b"), rngs).weight)) * 20 - 1) < 0.02
    table = Embedding(7, 5, rngs)
    rows = np.asarray(materialize(table.weight))
    np.testing.assert_array_equal(table(jnp.asarray([3, 0])), rows[[3, 0]])
    np.testing.assert_allclose(table.logits(jnp.asarray(x)), x @ rows.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_work_in_float32(norm, dtype):
    layer = norm(64, nnx.Rngs(0), epsilon=1e-5)
    rng = np.random.default_rng(0)
    layer.scale[...] = jnp.asarray(rng.standard_normal(64), jnp.float32)
    x = np.asarray(jnp.asarray(1e3 + rng.standard_normal((3, 64)), dtype), np.float64)
    centred = x - x.mean(-1, keepdims=True) if norm is LayerNorm else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(layer.scale[...])
    found = layer(jnp.asarray(x, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3 if norm is LayerNorm else 1e-5, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_channel_mixers(activation, gated):
    config = (GatedMLPConfig if gated else MLPConfig)(expand=1.5, activation=activation, bias=True)
    model = ModelConfig(width=6, layers=2, vocab_size=7, pattern=(BlockConfig(mixer=MambaConfig(), channel=config),))
    layer: Any = config.build(model, nnx.Rngs(0), 0)
    x = np.random.default_rng(0).standard_normal((2, 6))
    erf = np.vectorize(math.erf)
    exact = {
        "gelu": lambda a: a * (1 + erf(a / np.sqrt(2))) / 2,
        "gelu_tanh": lambda a: a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2,
        "silu": lambda a: a / (1 + np.exp(-a)),
        "relu": lambda a: np.maximum(a, 0),
        "relu_squared": lambda a: np.maximum(a, 0) ** 2,
    }[activation]
    w = {name: np.asarray(getattr(layer, name).weight[...], np.float64) for name in ("up", "down")}
    assert w["up"].shape == (6, 9)
    hidden = exact(x @ np.asarray(layer.gate.weight[...])) * (x @ w["up"]) if gated else exact(x @ w["up"])
    found, state = layer(jnp.asarray(x, jnp.float32))
    assert state is None
    np.testing.assert_allclose(found, hidden @ w["down"], atol=1e-5)


def test_axes_must_name_every_dimension():
    with pytest.raises(ValueError, match="do not name the dimensions"):
        parameter(lambda key, shape: jnp.zeros(shape), (2, 3), ("embed",), nnx.Rngs(0))
