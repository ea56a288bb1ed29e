"""Quantization-aware training: what multiplies is what compression makes of the weights, and the rest learns."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla import configs
from phyla.compression.compress import compress
from phyla.compression.matrices import dotted, weights
from phyla.compression.qat import Rounding
from phyla.compression.quantize import Quantize
from phyla.compression.recipes import parse
from phyla.kernels.quantized_matmul import quantize_ternary
from phyla.models.errors import UserError
from phyla.models.fake import FakeQuantized, LearnedSteps, first_steps, instead, learned_rounding
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import materialize
from phyla.training.config import LoopConfig, OptimizerConfig
from phyla.training.objectives import next_token
from phyla.training.optimizer import make_optimizer
from phyla.training.step import NOTHING, initial_state, make_step, split

TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 0, 61)
BATCH = {"tokens": TOKENS, "segment_ids": jnp.ones_like(TOKENS)}
MODES = {
    "transformer": ("qat-int4-g8", "int4-g8"),
    "mamba": ("qat-w8a8", "w8a8"),
    "jamba": ("lsq-int4", "fix-qat"),
    "rwkv": ("qat-ternary", "ternary"),
    "xlstm": ("qat-int8", "int8"),
}
"""Of each family one, with what ends it; slow tests have all."""
ALL = [
    pytest.param(family, *mode, marks=() if mode == MODES[family] else pytest.mark.slow)
    for family in configs.SMALL
    for mode in MODES.values()
]


@functools.cache
def built(family: str) -> LanguageModel:
    """The small experiment's model, tiny, with random values wherever the initialisation has zeros."""
    config = configs.experiment(family).model
    config = dataclasses.replace(config, width=32, layers=max(2, len(config.pattern)), vocab_size=61, groups=None)
    model = LanguageModel(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable[...] = np.asarray(variable[...]) + 0.1 * rng.standard_normal(variable.shape, np.float32)
    return model


def trained(model: LanguageModel) -> tuple[LanguageModel, Any]:
    """After a step; and its metrics."""
    graphdef, params, frozen = split(model)
    loop = LoopConfig(steps=10)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_fraction=0), 10, (params, NOTHING))
    step = jax.jit(make_step(graphdef, functools.partial(next_token, chunk=64), optimizer, loop))
    state = initial_state(params, optimizer, loop)._replace(frozen=(frozen, NOTHING))
    state, metrics = step(state, BATCH)
    assert not state.skipped
    return nnx.merge(graphdef, state.params, state.frozen[0]), metrics


@jax.jit(static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: nnx.State) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model(TOKENS)[0])


def logits(model: LanguageModel) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model)))


@jax.jit(static_argnums=0)
def _values(graphdef: nnx.GraphDef, params: nnx.State) -> dict[str, jax.Array]:
    return {dotted(path): materialize(held) for path, held in weights(nnx.merge(graphdef, params)).items()}


def values(model: LanguageModel) -> dict[str, np.ndarray]:
    return jax.device_get(_values(*nnx.split(model)))


@pytest.mark.parametrize(("family", "before", "after"), ALL)
def test_training_ends_in_the_weights_that_compression_makes(family, before, after):
    """Every mode, on each of the five families, bit for bit; and it is what was trained that was rounded."""
    (first,) = compress(built(family), parse(before))
    model, metrics = trained(first.model)
    assert np.isfinite(metrics.gradient_norm)
    fakes = {dotted(path): held for path, held in weights(model).items() if isinstance(held, FakeQuantized)}
    assert sorted(fakes) == sorted(first.changed)
    start = {dotted(path): held for path, held in weights(first.model).items()}
    for name, fake in fakes.items():
        assert np.any(np.asarray(fake.body[...]) != np.asarray(start[name].body[...])), name  # pyright: ignore
    (last,) = compress(model, parse(after))
    assert sorted(last.changed) == sorted(first.changed)
    compressed = {dotted(path): held for path, held in weights(last.model).items()}
    assert all(isinstance(compressed[name], Quantized) for name in fakes)
    rounded, fixed = values(model), values(last.model)
    for name, value in rounded.items():
        np.testing.assert_array_equal(value, fixed[name], err_msg=name)
    if family == "transformer" and before != "qat-w8a8":  # where a rounding error may change an activation's code
        np.testing.assert_allclose(logits(model), logits(last.model), rtol=1e-4, atol=2e-5)
    assert last.model.embedding.weight.nbytes < built(family).embedding.weight.nbytes  # pyright: ignore


def test_what_is_rounded_counts_as_the_identity():
    """The derivative by the body is that by the rounded matrix, also through rounded activations."""
    w, x = jax.random.normal(jax.random.key(0), (12, 5)), jax.random.normal(jax.random.key(1), (4, 12))
    rounding = Rounding(recipe=Quantize(format="int8"), dynamic=True)

    def loss(w, x):
        return jnp.sum(jnp.sin(FakeQuantized(nnx.Param(w), rounding).matmul(x)))

    by_w, by_x = jax.grad(loss, (0, 1))(w, x)
    W, X = np.float64(w), np.float64(x)
    step_w, step_x = np.abs(W).max(0) / 127, np.abs(X).max(1, keepdims=True) / 127
    W, X = np.round(W / step_w) * step_w, np.round(X / step_x) * step_x
    g = np.cos(X @ W)
    np.testing.assert_allclose(by_w, X.T @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_x, g @ W.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(instead(x, 2 * x), 2 * x)
    found, fixed = FakeQuantized(nnx.Param(w), rounding), Quantized(rounding(w), ("embed", "mlp"))
    np.testing.assert_allclose(found.matmul(x), fixed.matmul(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("group", "tensor"), [(6, False), (4, False), (6, True)])
def test_steps_are_learned_by_the_formula(group, tensor):
    """Esser et al. 2020, equations 1 to 3 and section 2.2, in float64."""
    K, N, bits = 6, 5, 3
    w, x = jax.random.normal(jax.random.key(0), (K, N)), jax.random.normal(jax.random.key(1), (4, K))
    step = 0.4 * first_steps(w, bits, None if tensor else group)  # so that some weights are outside

    def loss(w, step):
        weight = LearnedSteps(nnx.Param(w), nnx.Param(step), bits=bits, group=group)
        return jnp.sum(jnp.sin(weight.matmul(x)))

    by_w, by_step = jax.grad(loss, (0, 1))(w, step)
    W, X, S = np.float64(w), np.float64(x), np.float64(step)
    each = np.broadcast_to(S, (K, N)) if tensor else np.repeat(S, group, axis=0)[:K]
    v, least, most = W / each, -4, 3
    inside = (v > least) & (v < most)
    assert inside.any()
    assert not inside.all()
    g = X.T @ np.cos(X @ (np.clip(np.round(v), least, most) * each))
    np.testing.assert_allclose(by_w, g * inside, rtol=1e-4, atol=1e-5)
    of_each = g * np.where(inside, np.round(v) - v, np.clip(v, least, most))
    shared = K * N if tensor else group
    parts = [of_each] if tensor else [of_each[i : i + group] for i in range(0, K, group)]
    expected = [part.sum(None if tensor else 0) / np.sqrt(shared * most) for part in parts]
    np.testing.assert_allclose(by_step, expected[0] if tensor else expected, rtol=1e-4, atol=1e-5)
    weight = LearnedSteps(nnx.Param(w), nnx.Param(step), bits=bits, group=group)
    np.testing.assert_array_equal(weight.held().materialize(), weight.materialize())
    assert learned_rounding(jnp.float32(9.0), jnp.float32(1.0), least, most, 1.0) == most


def test_first_steps_are_those_of_the_paper():
    w = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    parts = [np.abs(w[i : i + 4]).mean(0) for i in (0, 4, 8)]
    np.testing.assert_allclose(first_steps(jnp.asarray(w), 4, 4), 2 * np.stack(parts) / np.sqrt(7), rtol=1e-5)
    np.testing.assert_allclose(first_steps(jnp.asarray(w), 8, None), 2 * np.abs(w).mean() / np.sqrt(127), rtol=1e-5)


def test_ternary_is_bitnets():
    """Ma et al. 2024: one scale, the mean magnitude; a weight takes two bits."""
    w = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    held = quantize_ternary(jnp.asarray(w))
    scale = np.abs(np.float64(w)).mean()
    np.testing.assert_allclose(held.materialize(), np.clip(np.round(w / scale), -1, 1) * scale, rtol=1e-5)
    assert held.codes.nbytes == 3 * 3


def test_what_does_not_fit_is_refused():
    (learned,) = compress(built("transformer"), parse("lsq-int4"))
    with pytest.raises(UserError, match=r"its steps are learned: fix-qat rounds it by them"):
        compress(learned.model, parse("int4"))
    with pytest.raises(UserError, match="not trained to be rounded"):
        compress(built("transformer"), parse("fix-qat"))
    with pytest.raises(UserError, match="a group is a multiple of 2; nearest: int4-g4"):
        parse("lsq-int4-g3")
    with pytest.raises(UserError, match="no method 'qat-gptq-int4'"):
        parse("qat-gptq-int4")
    # What a text says of matrices that are rounded in training is found under their names.
    (first,) = compress(built("transformer"), parse("qat-int4@mixer"))
    (last,) = compress(first.model, parse("gptq-int4@mixer"))
    assert not any(isinstance(held, FakeQuantized) for held in weights(last.model).values())
