"""Distillation: the divergences, the terms, the frozen teacher, and what begins with the teacher's parameters."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla import configs
from phyla.cli import main
from phyla.compression.compress import abstract
from phyla.compression.recipes import parse
from phyla.experiments import distill_arguments
from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.weights import materialize
from phyla.training import run
from phyla.training.config import DISTILLATIONS, DistillationConfig, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig
from phyla.training.data.sources import documents
from phyla.training.distillation import Distillation, divergence
from phyla.training.internals import layer_pairs
from phyla.training.loop import train
from phyla.training.objectives import next_token, next_tokens
from phyla.training.optimizer import make_optimizer
from phyla.training.saved import load
from phyla.training.step import initial_state, make_step, split
from phyla.training.transfer import initialise_from

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


def values(model: LanguageModel) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def test_half_the_layers_of_a_teacher_are_copied():
    """Of 12 layers 6: those of DistilBERT."""
    its, student = model_of(1, layers=12), model_of(layers=6)
    model, copied, left = initialise_from(student, its)
    assert not left
    assert set(copied) == set(values(model))
    there = values(its)
    for name, value in values(model).items():
        expected = there[name][[0, 2, 4, 7, 9, 11]] if name.startswith("periods") else there[name]
        np.testing.assert_array_equal(value, expected)


def test_attention_becomes_mamba_where_the_shapes_allow():
    """out <- O, x <- V, B <- K, C <- Q; keys and values of a group are repeated; the rest is the student's own."""
    grouped = BlockConfig(mixer=AttentionConfig(heads=4, kv_heads=2, head_dim=2), channel=MLPConfig(expand=2.0))
    mixer = Mamba2Config(expand=1.0, head_dim=2, state=2, groups=4)
    its, student = (
        model_of(1, pattern=(grouped,)),
        model_of(pattern=(BlockConfig(mixer=mixer, channel=ATTENTION.channel),)),
    )
    model, copied, left = initialise_from(student, its)
    before, after, there = values(student), values(model), values(its)
    mixed = "periods.blocks.0.mixer."
    projection, old = after[mixed + "in_proj.weight"], before[mixed + "in_proj.weight"]
    repeated = {name: np.repeat(there[f"{mixed}{name}.weight"].reshape(2, 8, 2, 2), 2, axis=2) for name in "kv"}
    np.testing.assert_array_equal(projection[..., :8], old[..., :8])  # z
    np.testing.assert_array_equal(projection[..., 8:16], repeated["v"].reshape(2, 8, 8))
    np.testing.assert_array_equal(projection[..., 16:24], repeated["k"].reshape(2, 8, 8))
    np.testing.assert_array_equal(projection[..., 24:32], there[mixed + "q.weight"])
    np.testing.assert_array_equal(projection[..., 32:], old[..., 32:])  # dt
    np.testing.assert_array_equal(after[mixed + "out_proj.weight"], there[mixed + "o.weight"])
    assert copied[mixed + "in_proj.weight"] == pytest.approx(24 / 36)
    assert left[mixed + "A_log"] == "the teacher has none"
    same = [name for name in after if ".channel" in name or ".mixer_norm" in name or not name.startswith("periods")]
    assert len(same) == 6
    for name in same:
        np.testing.assert_array_equal(after[name], there[name])


def test_what_does_not_fit_stays_and_says_why():
    student = model_of()
    model, copied, left = initialise_from(student, nnx.merge(*teacher()))
    assert not copied
    assert left["embedding.weight"] == "31 × 8 here, 31 × 12 there"
    jax.tree.map(np.testing.assert_array_equal, values(student), values(model))


def test_a_student_of_a_run(trained, tmp_path, capsys):
    """The command: stopped and continued is the same run; the teacher is needed for training only, and not saved."""
    options = ["--loop.steps", "6", "--loop.checkpoint-every", "3", "--loop.eval-every", "6", "--mesh.data", "1"]
    options += ["--model.width", "20", "--model.layers", "1", "--model.pattern.0.mixer.head-dim", "4"]
    command = ["distill", str(trained), "transformer", "--recipe", "hidden", *options, "--distillation.cosine", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(load(trained).params)]
    assert main([*command, "--out", str(whole)]) == 0
    assert main([*command, "--out", str(parts), "--max-steps", "3"]) == 0
    assert main([*command, "--out", str(parts)]) == 0
    a, b = load(whole), load(parts)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(load(trained).params))
    assert not list(whole.glob("checkpoints/*/frozen"))
    record = run.read_record(whole)["experiment"]
    assert record["teacher"] == str(trained)
    assert record["name"] == "transformer-of-tiny"
    assert record["distillation"]["cosine"] == record["distillation"]["hidden"] == 1
    assert record["data"] == run.read_record(trained)["experiment"]["data"]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {"soft", "hidden", "embedding", "cosine"} <= set(lines[0])
    saved_record = json.loads((whole / "config.json").read_text())
    saved_record["experiment"]["teacher"] = "gone"
    (whole / "config.json").write_text(json.dumps(saved_record))
    assert main(["evaluate", str(whole)]) == 0
    found = json.loads((whole / "evaluation.json").read_text())["nats_per_token"]
    assert found == pytest.approx(json.loads((whole / "summary.json").read_text())["nats_per_token"], rel=1e-6)


def test_a_student_with_another_tokenizer_is_refused(trained, tmp_path, capsys):
    other = ["--data.tokenizer", "bpe:260", "--out", str(tmp_path / "student")]
    assert main(["distill", str(trained), "transformer", *other]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "the student's tokenizer is not that of its teacher" in shown
    assert not (tmp_path / "student").exists()
    assert main(["distill", str(trained), "transformer", "--model.vocab-size", "300", "--out", other[-1]]) == 2
    assert "model.vocab_size 300 is not the teacher's 257" in capsys.readouterr().err
    assert main(["distill", str(trained), "transformer", "--recipe", "distillbert"]) == 2
    assert "no recipe 'distillbert'; nearest: distilbert" in capsys.readouterr().err
    assert main(["distill", str(trained), "transformer", "--distillation.top-k", "257", "--out", other[-1]]) == 2
    assert "distillation.top_k must be below model.vocab_size 257, not 257" in capsys.readouterr().err
    assert main(["distill", str(trained), "transformer", "--recipe"]) == 2
    assert "--recipe needs a value" in capsys.readouterr().err
    assert main(["distill", str(tmp_path), "transformer"]) == 2
    assert main(["distill", str(trained)]) == 2


def test_a_run_as_the_student_and_a_teacher_of_its_own_kind(trained, tmp_path):
    """It begins with the run's parameters; with itself as the teacher and nothing else to learn it stays there."""
    still = ["--distillation.hard", "0", "--optimizer.weight-decay", "0", "--loop.steps", "1", "--mesh.data", "1"]
    assert main(["distill", str(trained), str(trained), *still, "--out", str(tmp_path / "same")]) == 0
    summary = json.loads((tmp_path / "same" / "summary.json").read_text())
    before = json.loads((trained / "summary.json").read_text())
    assert summary["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=0.05)
    assert summary["skipped_updates"] == 0


def test_a_student_trains_on_what_its_teacher_says(trained, tmp_path, capsys):
    """Sequence-level distillation: the teacher's generations are documents, a line each."""
    texts = tmp_path / "teacher.jsonl"
    command = [
        "generate",
        str(trained),
        "--prompt",
        "the ",
        "--copies",
        "3",
        "--max-tokens",
        "40",
        "--temperature",
        "1",
    ]
    assert main([*command, "--text", str(texts), "--json", str(tmp_path / "all.json")]) == 0
    assert "3 documents" in capsys.readouterr().out
    found = list(documents(DataConfig(source=str(texts), validation="austen"), "train"))
    assert len(found) == len(set(found)) == 3
    assert all(text.startswith("the ") and len(text) > 4 for text in found)
    assert main([*command, "--text", str(tmp_path / "teacher.txt")]) == 2


def test_every_recipe_is_explained(capsys):
    assert main(["distill", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in DISTILLATIONS)
    assert "distilbert           soft 5.0, hard 2.0, temperature 2.0, cosine 1.0, copy True" in shown


def test_a_copied_teacher_is_where_the_student_begins(trained, tmp_path, capsys):
    """A student of the teacher's shape, copied whole: after a step of almost no size it has the teacher's loss."""
    experiment = dataclasses.replace(
        load(trained).experiment,
        teacher=str(trained),
        distillation=DISTILLATIONS["mamba-in-llama"],
        optimizer=OptimizerConfig(learning_rate=1e-9),
        loop=LoopConfig(steps=1, batch_size=8, eval_tokens=None),
    )
    summary = train(experiment, Path(tmp_path / "copied"))
    before = json.loads((trained / "summary.json").read_text())["bits_per_byte"]
    assert summary is not None
    assert summary["bits_per_byte"] == pytest.approx(before, rel=1e-5)
    assert "copied from the teacher: embedding.weight" in capsys.readouterr().err


def test_stages_freeze_and_thaw(trained, tmp_path):
    """Mixers alone are trained in MOHAWK's first two stages, and all in the last; by hand as in the chain."""
    mixers = r"bitfit@\.mixer\."
    first = distill_arguments([str(trained), "xlstm", "--recipe", "mohawk-mixing", "--model.width", "16"]).experiment
    assert (first.recipes, first.base) == (mixers, None)
    assert first.distillation == DISTILLATIONS["mohawk-mixing"]
    stage = tmp_path / "stage"
    run.create(stage, first, None, compression=parse(mixers))
    second = distill_arguments([str(trained), str(stage), "--recipe", "mohawk-blocks"]).experiment
    assert (second.recipes, second.base, second.name) == ("", str(stage), first.name)
    third = distill_arguments([str(trained), str(stage), "--recipe", "mohawk-logits"]).experiment
    assert (third.recipes, third.model) == ("thaw", first.model)
    assert distill_arguments([str(trained), str(trained), "--recipe", "mohawk-logits"]).experiment.recipes == ""


def test_stages_are_as_many_as_their_steps(trained, capsys):
    assert main(["distill", str(trained), "xlstm", "--recipe", "mohawk", "--stage-steps", "1,2"]) == 2
    assert "--stage-steps 1,2 must be as many numbers as mohawk has stages, 3" in capsys.readouterr().err
    assert main(["distill", str(trained), "xlstm", "--recipe", "mohawks"]) == 2
    assert "no recipe 'mohawks'; nearest: mohawk" in capsys.readouterr().err


@pytest.mark.slow
def test_a_chain_of_stages_goes_on_where_it_was_interrupted(experiment, tmp_path):
    """MOHAWK from attention to mLSTM: what a stage freezes is the teacher's, and the matrices come nearer."""
    attention = BlockConfig(mixer=AttentionConfig(heads=2), channel=GatedMLPConfig())
    teacher = tmp_path / "teacher"
    train(dataclasses.replace(experiment, model=ModelConfig(width=16, layers=2, pattern=(attention,))), teacher)
    out = tmp_path / "out"
    command = ["distill", str(teacher), "xlstm", "--recipe", "mohawk", "--stage-steps", "20,4,3", "--mesh.data", "1"]
    command += ["--model.width", "16", "--model.layers", "2", "--model.pattern.0.mixer.heads", "2"]
    command += ["--model.pattern.0.mixer.input-bias", "0", "--optimizer.learning-rate", "0.03"]
    command += ["--loop.batch-size", "8", "--loop.log-every", "1", "--loop.checkpoint-every", "10", "--out", str(out)]
    stages = [out.with_name("out-mohawk-mixing"), out.with_name("out-mohawk-blocks"), out]
    assert main([*command, "--max-steps", "3"]) == 0
    assert [path.exists() for path in stages] == [True, False, False]
    assert main(command) == 0
    assert [json.loads((path / "summary.json").read_text())["steps"] for path in stages] == [20, 4, 3]
    its, *found = (values(load(path).model()) for path in (teacher, *stages))
    copied = [name for name in its if ".channel." in name or "norm" in name or name == "embedding.weight"]
    for name in copied:
        np.testing.assert_array_equal(found[0][name], its[name])
        np.testing.assert_array_equal(found[1][name], its[name])
        assert not np.array_equal(found[2][name], its[name])
    assert not np.array_equal(found[0]["periods.blocks.0.mixer.q.weight"], found[1]["periods.blocks.0.mixer.q.weight"])
    lines = [json.loads(line) for line in (stages[0] / "metrics.jsonl").read_text().splitlines()]
    mixing = [line["mixing"] for line in lines if "mixing" in line]
    assert len(mixing) == 20
    assert np.mean(mixing[-3:]) < 0.8 * np.mean(mixing[:3])


def test_thaw_undoes_what_a_stage_froze():
    config = model_of().config
    _, trained, frozen = split(abstract(config, parse(r"bitfit@\.mixer\.")))
    assert all("mixer" in path for path, _ in nnx.to_flat_state(trained))
    assert frozen
    assert not split(abstract(config, parse(r"bitfit@\.mixer\.+thaw")))[2]
    with pytest.raises(UserError, match="thaw: no parameter of this model is frozen"):
        abstract(config, parse("thaw"))
