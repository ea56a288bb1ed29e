"""The step: exact accumulation, exact counting, and nothing learned from what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from phyla.models.weights import constant, parameter
from phyla.training.config import LoopConfig, OptimizerConfig
from phyla.training.objectives import Loss
from phyla.training.optimizer import make_optimizer
from phyla.training.saved import make_objective
from phyla.training.step import NOTHING, initial_state, make_step


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_accumulation_equals_the_whole_batch(experiment, setup, batch, microbatches):
    step, state, _, _ = setup(experiment)
    parts, _, _, _ = setup(experiment, microbatches=microbatches)
    (whole, a), (accumulated, b) = step(state, batch), parts(state, batch)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
    np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
    assert a.tokens == b.tokens == 47 - 8
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), whole.params, accumulated.params)


def test_the_gradient_is_that_of_the_mean_over_tokens(experiment, setup, batch):
    step, state, graphdef, experiment = setup(experiment)
    objective = make_objective(experiment, mask_id=30)

    def mean(params):
        loss = objective(nnx.merge(graphdef, params), batch, jax.random.key(0))
        return loss.total / loss.weight

    loss, gradient = jax.value_and_grad(mean)(state.params)
    metrics = step(state, batch)[1]
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(gradient), rtol=1e-5)


def test_a_non_finite_update_is_skipped_and_counted(experiment, setup, batch):
    step, state, _, _ = setup(experiment, ema=0.5)
    broken = jax.tree.map(jnp.copy, state.params)
    broken["norm"]["scale"][...] = broken["norm"]["scale"][...].at[0].set(jnp.inf)
    before = state._replace(params=broken)
    after, metrics = step(before, batch)
    assert (metrics.skipped, metrics.skipped_in_a_row, after.step) == (1, 1, 1)
    for old, new in (
        (before.params, after.params),
        (before.optimizer, after.optimizer),
        (before.ema, after.ema),
    ):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    after, metrics = step(after, batch)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (2, 2)
    mended, metrics = step(after._replace(params=state.params), batch)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (2, 0)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state.params, mended.params)))


def test_the_average_follows_the_parameters(experiment, setup, batch):
    step, state, _, _ = setup(experiment, ema=0.75)
    after, _ = step(state, batch)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, state.params, after.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), expected, after.ema)


def test_the_loss_goes_down(experiment, setup, batch):
    step, state, _, _ = setup(experiment)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"loop\.microbatches 5 does not divide loop\.batch_size 16; nearest: 4"):
        LoopConfig(batch_size=16, microbatches=5)


class Numbers(nnx.Module):
    def __init__(self):
        self.numbers = parameter(constant(1.0), (3,), ("norm",), nnx.Rngs(0))


def step_of(objective, **loop):
    """The step of an objective on three numbers, the state before it and a batch."""
    graphdef, params = nnx.split(Numbers())
    config = LoopConfig(batch_size=4, **loop)
    optimizer = make_optimizer(OptimizerConfig(), 10, (params, NOTHING))
    step = jax.jit(make_step(graphdef, objective, optimizer, config))
    return step, initial_state(params, optimizer, config), {"tokens": jnp.zeros((4, 3), jnp.int32)}


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_a_gradient_alone_that_is_not_finite_is_enough(broken):
    def objective(model, batch, rng):
        x = model.numbers[...]
        total = jnp.sum(x) + jnp.inf if broken == "loss" else jnp.sum(jnp.sqrt(x - x))
        return Loss(total, jnp.ones(()), {})

    step, state, batch = step_of(objective)
    after, metrics = step(state, batch)
    assert jnp.isfinite(metrics.loss) == (broken == "gradient")
    assert jnp.isfinite(metrics.gradient_norm) == (broken == "loss")
    assert metrics.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, after.params)


def test_every_step_and_microbatch_draws_its_own_numbers_and_the_same_again():
    def objective(model, batch, rng):
        draw = jax.random.uniform(rng)
        return Loss(jnp.sum(model.numbers[...]), jnp.ones(()), {"draw": draw, "square": draw**2})

    step, state, batch = step_of(objective)
    first, again, next_ = (step(s, batch)[1].extra["draw"] for s in (state, state, step(state, batch)[0]))
    assert first == again != next_
    step, state, batch = step_of(objective, microbatches=2)
    extra = step(state, batch)[1].extra
    assert extra["square"] - extra["draw"] ** 2 > 1e-6  # a variance: the two differ


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_penalty_is_minimised_and_not_reported(microbatches):
    def objective(model, batch, rng):
        x = model.numbers[...]
        return Loss(2 * jnp.sum(x), jnp.asarray(2.0), {}, penalty=2 * x[0])

    step, state, batch = step_of(objective, microbatches=microbatches)
    metrics = step(state, batch)[1]
    assert metrics.loss == 3
    np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(4 + 1 + 1), rtol=1e-6)


def test_a_penalty_that_is_not_finite_is_skipped():
    def objective(model, batch, rng):
        return Loss(jnp.sum(model.numbers[...]), jnp.ones(()), {}, penalty=jnp.inf)

    step, state, batch = step_of(objective)
    after, metrics = step(state, batch)
    assert metrics.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, after.params)
