"""Distillation as an objective: the divergences, the terms, the layers that are compared, the frozen teacher."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla import configs
from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import MLPConfig
from phyla.models.weights import materialize
from phyla.training.config import DistillationConfig, LoopConfig, OptimizerConfig
from phyla.training.distillation import Distillation, divergence
from phyla.training.internals import layer_pairs
from phyla.training.objectives import next_token, next_tokens
from phyla.training.optimizer import make_optimizer
from phyla.training.step import initial_state, make_step, split

ATTENTION = BlockConfig(mixer=AttentionConfig(heads=2, head_dim=4), channel=MLPConfig(expand=2.0))


VOCABULARY = 31


def model_of(seed: int = 0, **fields) -> LanguageModel:
    fields = {"width": 8, "layers": 2, "pattern": (ATTENTION,), "vocab_size": VOCABULARY} | fields
    return nnx.clone(nnx.merge(*made(ModelConfig(**fields), seed)))


@functools.cache
def made(config: ModelConfig, seed: int) -> tuple:
    graphdef = nnx.split(sizes.abstract(config))[0]
    return graphdef, jax.jit(lambda: nnx.split(LanguageModel(config, nnx.Rngs(seed)))[1])()


@functools.cache
def teacher() -> tuple:
    """Wider and deeper than the student, and of firm opinions: near the uniform distribution divergences cancel."""
    model = model_of(1, width=12, layers=4)
    table: Any = model.embedding.weight
    table.set_value(30 * table[...])
    return nnx.split(model)


def distillation(student: LanguageModel, its=None, **terms) -> Distillation:
    config = student.config
    its = its or nnx.merge(*teacher())
    given = DistillationConfig(**terms), its, config, next_tokens
    return Distillation(*given, chunk=7, rngs=nnx.Rngs(0))


def as_float64(student, its, kind, temperature):
    """Plainly, with numpy."""

    def softmax(x):
        x = np.exp(np.asarray(x, np.float64) / temperature - np.max(x, -1, keepdims=True) / temperature)
        return x / x.sum(-1, keepdims=True)

    q, p = softmax(student), softmax(its)
    kl = lambda a, b: (a * (np.log(a) - np.log(b))).sum(-1)  # noqa: E731
    m = (p + q) / 2
    found = {"forward-kl": kl(p, q), "reverse-kl": kl(q, p), "jensen-shannon": (kl(p, m) + kl(q, m)) / 2}
    return temperature**2 * found[kind]


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jensen-shannon"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_those_of_float64(kind, temperature):
    """The values, and the gradients by central differences of the float64 values."""
    student, its = 4 * jax.random.normal(jax.random.key(0), (2, 3, 9))
    of = jax.jit(functools.partial(divergence, kind=kind, temperature=temperature))
    expected = as_float64(student, its, kind, temperature)
    np.testing.assert_allclose(of(student, its), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(of(x, its))))(student)
    base, step = np.asarray(student, np.float64), 1e-4
    for i in range(9):
        up, down = base.copy(), base.copy()
        up[:, i] += step
        down[:, i] -= step
        slope = (as_float64(up, its, kind, temperature) - as_float64(down, its, kind, temperature)) / (2 * step)
        np.testing.assert_allclose(gradient[:, i], slope, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(of(its, its), 0, atol=1e-5)
    far = jnp.asarray([[1e4, -1e4, 0.0]])
    assert np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(of(x, -far))))(far)).all()


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jensen-shannon"])
def test_the_likeliest_tokens_and_the_rest_as_one(kind):
    """Against float64 on distributions of k + 1 outcomes; with all but one token told apart it is the whole."""
    keys = jax.random.split(jax.random.key(3))
    student, its = (3 * jax.random.normal(key, (4, 9)) for key in keys)
    order = np.argsort(-np.asarray(its), axis=-1)
    few: list[Any] = []
    for logits in (student, its):
        p = np.exp(np.asarray(logits, np.float64) / 2)
        p = np.take_along_axis(p / p.sum(-1, keepdims=True), order, axis=-1)
        few.append(2 * np.log(np.concatenate([p[:, :3], p[:, 3:].sum(-1, keepdims=True)], axis=-1)))
    of = jax.jit(functools.partial(divergence, kind=kind, temperature=2.0), static_argnames="top_k")
    found = of(student, its, top_k=3)
    np.testing.assert_allclose(found, as_float64(few[0], few[1], kind, 2.0), rtol=1e-5, atol=1e-6)
    assert (found < of(student, its)).all()  # what is told apart less differs less
    np.testing.assert_allclose(of(student, its, top_k=8), of(student, its), rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(of(x, its, top_k=3))))(student)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-5)


@functools.cache
def terms_of(**terms) -> Callable:
    """The loss and its gradient for the student, compiled."""
    student = model_of()
    objective = distillation(student, **terms)
    graphdef, params = nnx.split(student)
    own_graphdef, own, frozen = split(objective)

    def minimised(params, own, frozen, batch):
        loss = nnx.merge(own_graphdef, own, frozen)(nnx.merge(graphdef, params), batch, jax.random.key(0))
        return loss.total + loss.penalty, loss

    of = jax.jit(jax.grad(minimised, has_aux=True))
    return lambda batch: of(params, own, frozen, batch)


def test_without_the_teacher_it_is_the_next_tokens_loss_to_the_bit(batch):
    student = model_of()
    graphdef, params = nnx.split(student)

    def plain(params):
        loss = next_token(nnx.merge(graphdef, params), batch, jax.random.key(0), chunk=7)
        return loss.total + loss.penalty, loss

    expected, loss = jax.jit(jax.grad(plain, has_aux=True))(params)
    gradient, found = terms_of(soft=0.0, hard=1.0)(batch)
    assert (loss.total, loss.weight) == (found.total, found.weight)
    jax.tree.map(np.testing.assert_array_equal, expected, gradient)


def test_the_terms_are_what_they_say(batch):
    """Against numpy on the two models' own logits and layers, of the real tokens only."""
    _, loss = terms_of(soft=2.0, hard=0.25, cosine=0.5, hidden=3.0, embedding=0.75, temperature=3.0)(batch)
    student, its = model_of(), nnx.merge(*teacher())
    objective = distillation(student, cosine=1.0, hidden=1.0, embedding=1.0)
    matrices = [np.asarray(materialize(each.weight), np.float64) for each in objective.projections]
    asked = next_tokens(batch, jax.random.key(0))
    weights = np.asarray(asked.weights)

    @jax.jit
    def seen(student, its):
        mine = nnx.merge(nnx.split(model_of())[0], student).forward
        outputs = mine(asked.tokens, segment_ids=asked.segment_ids, layers=True)
        theirs = nnx.merge(teacher()[0], its).forward(asked.tokens, segment_ids=asked.segment_ids, layers=True)
        logits = nnx.merge(nnx.split(model_of())[0], student).logits(outputs.hidden)
        return outputs, theirs, logits, nnx.merge(teacher()[0], its).logits(theirs.hidden)

    mine, theirs, logits, its_logits = seen(nnx.split(student)[1], nnx.split(its)[1])
    assert mine.layers.shape == (3, 8, 8, 8)
    expected = {"soft": (as_float64(logits, its_logits, "forward-kl", 3.0) * weights).sum()}
    a, b = np.asarray(mine.hidden, np.float64) @ matrices[-1], np.asarray(theirs.hidden, np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected["cosine"] = ((1 - cosine) * weights).sum()
    layers = [np.square(np.asarray(mine.layers[i], np.float64) @ w - theirs.layers[2 * i]) for i, w in
              enumerate(matrices[:3])]  # fmt: skip
    expected["embedding"], *each = [(square.mean(-1) * weights).sum() for square in layers]
    expected["hidden"] = sum(each)
    for name, value in expected.items():
        np.testing.assert_allclose(loss.metrics[name], value, rtol=1e-5, err_msg=name)
    factors = {"soft": 2.0, "cosine": 0.5, "hidden": 3.0, "embedding": 0.75}
    minimised = 0.25 * loss.total + sum(factors[name] * value for name, value in expected.items())
    np.testing.assert_allclose(loss.total + loss.penalty, minimised, rtol=1e-5)


def test_what_is_only_reported_is_not_led_back(batch):
    """The right tokens' cross-entropy of a stage that does not minimise it costs no gradient: fewer operations."""

    def operations(hard: float) -> float:
        student = model_of()
        objective = distillation(student, model_of(1), soft=0.0, hard=hard, blocks=1.0)
        graphdef, params = nnx.split(student)

        def minimised(params):
            loss = objective(nnx.merge(graphdef, params), batch, jax.random.key(0))
            return loss.total + loss.penalty

        costs = jax.jit(jax.grad(minimised)).lower(params).cost_analysis()
        assert costs is not None
        return costs["flops"]

    assert operations(0.0) < 0.8 * operations(0.5)


def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(batch):
    student = model_of()
    objective = distillation(student, model_of(), hard=0.0, soft=1.0, hidden=1.0, blocks=1.0, cosine=1.0)
    assert not objective.projections
    loss = nnx.jit(lambda ask, model, batch: ask(model, batch, jax.random.key(0)))(objective, student, batch)
    for name, value in loss.metrics.items():
        np.testing.assert_allclose(value, 0, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(loss.total + loss.penalty, 0, atol=1e-4)


def test_blocks_are_given_the_teachers_inputs(batch):
    """One block that differs costs what it alone does, wherever it is."""
    student = model_of(prefix=(ATTENTION,))
    its = model_of(prefix=(ATTENTION,))
    channel: Any = student.prefix[0].channel
    down = channel.down.weight
    down.set_value(down[...] + 1.0)
    loss = nnx.jit(lambda ask, model, batch: ask(model, batch, jax.random.key(0)))
    found = loss(distillation(student, its, soft=0.0, hard=0.0, blocks=1.0), student, batch).metrics["blocks"]
    asked = next_tokens(batch, jax.random.key(0))

    def difference(model, its):
        forward = functools.partial(its.forward, asked.tokens, segment_ids=asked.segment_ids, layers=True)
        before, after = forward().layers[:2]
        y = model.prefix[0](before, None, None, asked.segment_ids)[0]
        return jnp.sum(jnp.mean(jnp.square(y - after), -1) * asked.weights)

    np.testing.assert_allclose(found, nnx.jit(difference)(student, its), rtol=1e-5)
    assert found > 0.1


def test_the_step_trains_the_projections_and_not_the_teacher(batch):
    """One step, in parts, has the loss and the terms of the whole batch."""
    student = model_of()
    objective = distillation(student, hidden=1.0)
    graphdef, params, _ = split(student)
    _, own, frozen = split(objective)
    assert len(jax.tree.leaves(own)) == 2
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == sum(x.size for x in jax.tree.leaves(teacher()[1]))
    config = LoopConfig(batch_size=8, microbatches=4)
    optimizer = make_optimizer(OptimizerConfig(), 10, (params, own))
    state = initial_state(params, optimizer, config, own)._replace(frozen=(nnx.State({}), frozen))
    after, metrics = jax.jit(make_step(graphdef, objective, optimizer, config))(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.frozen[1], frozen)
    assert not any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), own, after.objective)))
    gradient, loss = terms_of(hidden=1.0)(batch)
    assert metrics.tokens == loss.weight
    np.testing.assert_allclose(metrics.loss, loss.total / loss.weight, rtol=1e-5)
    np.testing.assert_allclose(metrics.extra["soft"], loss.metrics["soft"] / loss.weight, rtol=1e-5)
    norms = [float(jnp.sum(x**2)) for x in jax.tree.leaves(gradient)]
    assert float(metrics.gradient_norm) > np.sqrt(sum(norms)) / float(loss.weight)  # the projections' besides


@pytest.mark.parametrize("family", configs.SMALL)
def test_every_family_learns_from_every_other_kind_of_layer(family):
    """All terms and their gradients have shapes, for a Transformer's student of every family; nothing is computed."""
    config = dataclasses.replace(configs.experiment(family).model, vocab_size=VOCABULARY)

    def gradient(batch):
        student = LanguageModel(config, nnx.Rngs(0))
        graphdef, params = nnx.split(student)
        objective = distillation(
            student, model_of(layers=4, width=config.width), hidden=1.0, embedding=1.0, cosine=1.0, blocks=1.0
        )

        def minimised(params):
            loss = objective(nnx.merge(graphdef, params), batch, jax.random.key(0))
            return loss.total + loss.penalty, loss

        return jax.grad(minimised, has_aux=True)(params)

    tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
    found, loss = jax.eval_shape(gradient, {"tokens": tokens, "segment_ids": tokens})
    assert set(loss.metrics) >= {"soft", "hidden", "embedding", "cosine", "blocks"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


def test_layers_are_evenly_spaced_or_named():
    config = DistillationConfig()
    assert layer_pairs(config, 2, 4) == ((1, 2), (2, 4))
    assert layer_pairs(config, 4, 12) == ((1, 3), (2, 6), (3, 9), (4, 12))
    assert layer_pairs(config, 2, 1) == ((1, 1), (2, 1))
    assert layer_pairs(dataclasses.replace(config, layers=(4, 1)), 2, 4) == ((1, 4), (2, 1))
    with pytest.raises(UserError, match="must name 2 layers"):
        layer_pairs(dataclasses.replace(config, layers=(1,)), 2, 4)
    with pytest.raises(UserError, match="has 5, but the teacher's layers are 1 to 4"):
        layer_pairs(dataclasses.replace(config, layers=(1, 5)), 2, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"soft": 0.0, "hard": 0.0}, "must have a weight above 0"),
        ({"cosine": -1.0}, r"distillation\.cosine must be at least 0"),
    ],
)
def test_a_distillation_that_says_nothing_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        DistillationConfig(**fields)
    with pytest.raises(UserError, match=r"needs the teacher's width and layers: model\.width 12 and model\.layers 4"):
        distillation(model_of(), blocks=1.0)
