"""Schedules and optimizers, against their formulas."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.errors import UserError
from phyla.models.weights import constant, parameter
from phyla.training.config import OptimizerConfig
from phyla.training.optimizer import make_optimizer, schedule


class Parameters(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        normal = lambda key, shape: jax.random.normal(key, shape)  # noqa: E731
        self.matrix = parameter(normal, (3, 4, 6), ("layers", "embed", "mlp"), rngs, weight_decay=True, matrix=True)
        self.table = parameter(normal, (5, 4), ("vocab", "embed"), rngs, weight_decay=True)
        self.scale = parameter(constant(1.0), (4,), ("norm",), rngs)
        self.fast = parameter(constant(1.0), (4,), ("norm",), rngs, learning_rate=3.0)


def test_the_schedules_follow_their_formulas():
    steps, peak = 100, 2.0
    base = OptimizerConfig(learning_rate=peak, warmup_fraction=0.1, final_fraction=0.1, decay_fraction=0.2)
    names = ("cosine", "wsd", "constant")
    rate: dict[str, Any] = {name: schedule(dataclasses.replace(base, schedule=name), steps) for name in names}
    for name in names:
        np.testing.assert_allclose([rate[name](t) for t in (0, 4, 9)], [0.2, 1.0, 2.0], rtol=1e-6)
    for t in (10, 37, 80, 99, 100):
        cosine = peak * (0.1 + 0.9 * (1 + np.cos(np.pi * (t - 10) / 90)) / 2)
        np.testing.assert_allclose(rate["cosine"](t), cosine, rtol=1e-5)
        np.testing.assert_allclose(rate["wsd"](t), peak * (1 - 0.9 * max(0, t - 80) / 20), rtol=1e-5)
        assert rate["constant"](t) == peak


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_only_what_says_so_decays_and_the_multiplier_multiplies(name):
    params: Any = nnx.state(Parameters())
    config = OptimizerConfig(
        name=name, learning_rate=0.01, weight_decay=0.5, schedule="constant", warmup_fraction=0, clip_norm=1e9
    )

    def after(gradient: float) -> Any:
        optimizer = make_optimizer(config, 100, params)
        gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    updates = after(0.0)
    np.testing.assert_allclose(updates["matrix"][...], -0.005 * params["matrix"][...], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(updates["table"][...], -0.005 * params["table"][...], rtol=1e-5, atol=1e-8)
    assert not updates["scale"][...].any()
    assert not updates["fast"][...].any()

    updates = after(0.1)
    assert (updates["scale"][...] < 0).all()
    np.testing.assert_allclose(updates["fast"][...], 3 * updates["scale"][...], rtol=1e-5)


def test_muon_orthogonalises_each_layer_of_a_matrix():
    params = nnx.state(Parameters())
    optimizer = make_optimizer(OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=1e9), 100, params)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(4), p.shape), params)
    updates: Any = optimizer.update(gradients, optimizer.init(params), params)[0]
    update = updates["matrix"][...]
    singular = np.linalg.svd(np.asarray(update), compute_uv=False)
    assert (singular.max(-1) / singular.min(-1) < 2).all()  # Newton-Schulz brings them to about one
    before = np.linalg.svd(np.asarray(gradients["matrix"][...]), compute_uv=False)
    assert (before.max(-1) / before.min(-1)).max() > 2
    table = np.abs(updates["table"][...])  # not a matrix that multiplies: AdamW's first step is the gradient's sign
    np.testing.assert_allclose(table, table.mean(), rtol=1e-4)


def test_a_gradient_is_clipped_by_its_global_norm():
    params: Any = nnx.state(Parameters())
    draw = jax.tree.map(lambda p: jax.random.normal(jax.random.key(5), p.shape), params)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(draw)))

    def second_update(clip_norm, first, second):
        """Of gradients with these norms; Adam does not see what is common to both."""
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), 100, params)
        state = optimizer.init(params)
        for size in (first, second):
            gradient = jax.tree.map(lambda g, size=size: g * size / norm, draw)
            updates, state = optimizer.update(gradient, state, params)
        return updates

    clipped, by_hand = second_update(0.5, 30.0, 0.1), second_update(1e9, 0.5, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), clipped, by_hand)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_descends(name):
    params: Any = nnx.state(Parameters())
    config = OptimizerConfig(name=name, learning_rate=0.02, weight_decay=0.0, schedule="constant")
    optimizer = make_optimizer(config, 150, params)

    def loss(params):
        return sum(jnp.sum(jnp.square(leaf - 0.3)) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state, begin = optimizer.init(params), loss(params)
    for _ in range(150):
        params, state = step(params, state)
    assert loss(params) < 0.5 * begin


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", -1.0), ("clip_norm", 0.0), ("weight_decay", -0.1), ("warmup_fraction", 1.5)]
)
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(UserError, match=rf"optimizer\.{field}"):
        OptimizerConfig(**{field: value})
