"""A teacher's likeliest tokens on disk: written once, shard by shard, of this teacher and this text alone."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from phyla.cli import main
from phyla.models.errors import UserError
from phyla.training import lessons, sharding
from phyla.training.config import DistillationConfig, Experiment, MeshConfig
from phyla.training.data.pipeline import prepare, train_iterator
from phyla.training.distillation import IDS, LOG_P, between, divergence, likeliest, make_distillation, with_rest
from phyla.training.lessons import Lessons, make_lessons
from phyla.training.saved import load
from phyla.training.step import split

TOP_K = 3


def distilled(trained: Path, folder: Path, **fields: Any) -> Experiment:
    before = load(trained, arrays=False).experiment
    config = {"top_k": TOP_K, "temperature": 2.0, "cache": str(folder)} | fields
    return dataclasses.replace(
        before,
        name="student",
        teacher=str(trained),
        loop=dataclasses.replace(before.loop, steps=4, eval_every=4, checkpoint_every=2),
        distillation=DistillationConfig(**config),
    )


def opened(experiment: Experiment, **fields: Any) -> Lessons:
    """Of rows of its text."""
    teacher = load(Path(str(experiment.teacher)), arrays=False)
    found = Lessons(experiment, teacher, teacher.tokenizer, **fields)
    found.of(prepare(experiment.data, teacher.tokenizer, "train"))
    return found


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory) -> Path:
    """All lessons of the trained run on its text, in shards of seven rows."""
    folder = tmp_path_factory.mktemp("lessons") / "kept"
    experiment = distilled(trained, folder)
    assert make_lessons(experiment, load(trained, arrays=False), load(trained, arrays=False).tokenizer)
    bytes_of_row = 16 * (2 * TOP_K + 4 * (TOP_K + 1))
    opened(experiment, shard_bytes=7 * bytes_of_row).fill(sharding.make_mesh(MeshConfig(data=1), 8))
    return folder


def test_lessons_are_the_teachers_likeliest_tokens(trained, kept):
    """Against numpy on its logits, in float64, of rows in any order; the rest of them is one outcome."""
    experiment = distilled(trained, kept)
    saved = load(trained)
    packed: Any = prepare(experiment.data, saved.tokenizer, "train")
    asked = np.asarray([11, 0, 11, len(packed.tokens) - 1])
    rows: Any = {name: value[asked, :-1] for name, value in packed.rows.items()}
    tokens, segment_ids = rows["tokens"], rows["segment_ids"]

    @jax.jit
    def logits(params):
        model = nnx.merge(saved.graphdef, params)
        return model.logits(model(tokens, segment_ids=segment_ids)[0])

    expected = np.asarray(logits(saved.params), np.float64) / 2
    p = np.exp(expected - expected.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found: Any = opened(experiment).rows(asked)
    order = np.argsort(-p, axis=-1, kind="stable")
    likeliest = np.take_along_axis(p, order[..., :TOP_K], -1)
    assert found[IDS].shape == (4, 16, TOP_K)
    assert found[LOG_P].dtype == np.float32
    np.testing.assert_allclose(np.take_along_axis(p, found[IDS], -1), likeliest, rtol=1e-4)
    np.testing.assert_allclose(np.exp(found[LOG_P][..., :-1]), likeliest, rtol=1e-4)
    np.testing.assert_allclose(np.exp(found[LOG_P][..., -1]), 1 - likeliest.sum(-1), rtol=1e-3)
    shards = sorted(kept.glob("*.npy"))
    assert [path.name for path in shards] == [f"{i:05}.npy" for i in range(-(-len(packed.tokens) // 7))]


def test_what_is_interrupted_goes_on_with_the_next_shard(trained, kept, tmp_path, monkeypatch):
    """A kill in the middle of a shard: what is whole stays as it is, the rest is the same as at once."""
    experiment = distilled(trained, tmp_path / "parts")
    mesh = sharding.make_mesh(experiment.mesh, 8)
    rows_in_shard = json.loads((kept / "lessons.json").read_text())["rows_in_shard"]
    given = {"shard_bytes": rows_in_shard * 16 * (2 * TOP_K + 4 * (TOP_K + 1))}
    parts, asked = opened(experiment, **given), []

    def put(batch, mesh, put=sharding.put_batch):
        asked.append(len(batch["tokens"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return put(batch, mesh)

    monkeypatch.setattr(lessons.sharding, "put_batch", put)
    with pytest.raises(KeyboardInterrupt):
        parts.fill(mesh)
    assert [path.name for path in sorted((tmp_path / "parts").glob("*.npy"))] == ["00000.npy", "00001.npy"]
    (tmp_path / "parts" / "00002.tmp").write_bytes(b"half a shard")
    written = (tmp_path / "parts" / "00000.npy").stat().st_mtime_ns
    opened(experiment).fill(mesh)  # of another size of shards: that of the folder stays
    assert (tmp_path / "parts" / "00000.npy").stat().st_mtime_ns == written
    everything = np.arange(opened(experiment)._count)
    once, again = (opened(distilled(trained, folder)).rows(everything) for folder in (kept, tmp_path / "parts"))
    for name in (IDS, LOG_P):
        np.testing.assert_array_equal(once[name], again[name])
    count = len(asked)
    opened(experiment).fill(mesh)
    assert len(asked) == count


def test_lessons_teach_what_the_teacher_does(trained, kept):
    """The loss, its terms and the gradient, from the cache and online; rows in the order of training."""
    saved = load(trained)
    graphdef, params, _ = split(saved.model())
    cached = distilled(trained, kept)
    online = dataclasses.replace(cached, distillation=dataclasses.replace(cached.distillation, cache=None))
    data = train_iterator(cached.data, saved.tokenizer, batch_size=8, seed=3, beside=opened(cached).of)
    batch = next(data)
    asks: list[Any] = [make_distillation(experiment, saved.model(), 0) for experiment in (cached, online)]

    @jax.jit
    def both(params, batch):
        student = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(0), x.shape), params)

        def minimised(params, ask):
            loss = ask(nnx.merge(graphdef, params), batch, jax.random.key(0))
            return loss.total + loss.penalty, loss

        return [jax.grad(minimised, has_aux=True)(student, ask) for ask in asks]

    (gradient, loss), (expected, its) = both(params, batch)
    np.testing.assert_allclose(loss.total, its.total, rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["soft"], its.metrics["soft"], rtol=1e-5)
    assert loss.metrics["soft"] > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, expected)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jensen-shannon"])
def test_every_divergence_is_the_same_from_a_lesson(kind):
    @jax.jit
    def both(student, teacher):
        ids, log_p = likeliest(teacher, temperature=3.0, top_k=4)
        log_q = with_rest(jax.nn.log_softmax(student / 3), ids)
        online = divergence(student, teacher, kind=kind, temperature=3.0, top_k=4)
        return 9 * between(log_p, log_q, kind), online

    found, expected = both(*(3 * jax.random.normal(key, (5, 20)) for key in jax.random.split(jax.random.key(1))))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_run_with_lessons_is_the_run_with_the_teacher(trained, kept, tmp_path, monkeypatch):
    """By the command, interrupted too; the teacher's arrays are never read."""
    options = ["--distillation.top-k", str(TOP_K), "--distillation.temperature", "2", "--loop.steps", "4"]
    options += ["--loop.checkpoint-every", "2", "--mesh.data", "1", "--optimizer.learning-rate", "0.01"]
    student = ["distill", str(trained), str(trained), *options]
    assert main([*student, "--out", str(tmp_path / "online")]) == 0
    read: list[Path] = []

    def loading(folder, *, arrays=True, load=load):
        read.extend([folder] * arrays)
        return load(folder, arrays=arrays)

    monkeypatch.setattr("phyla.training.lessons.load", loading)
    monkeypatch.setattr("phyla.training.start.load", loading)
    cached = [*student, "--distillation.cache", str(kept), "--out", str(tmp_path / "cached")]
    assert main([*cached, "--max-steps", "2"]) == 0
    assert read == [trained]  # the student's beginning; not the teacher
    assert main(cached) == 0
    first, second = (load(tmp_path / name) for name in ("online", "cached"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), first.params, second.params)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("online", "cached")
    ]
    for one, other in zip(*lines, strict=True):
        if "soft" in one:
            np.testing.assert_allclose(one["soft"], other["soft"], rtol=1e-3)


def test_lessons_of_something_else_are_refused(trained, kept, tmp_path, capsys):
    """One line, before a run exists."""
    student = ["distill", str(trained), str(trained), "--out", str(tmp_path / "student"), "--distillation.top-k", "3"]
    student += ["--distillation.temperature", "2", "--distillation.cache", str(kept)]
    changed = tmp_path / "changed.txt"
    changed.write_text("quite another text than that. " * 40)
    for options, said in (
        (["--distillation.top-k", "4"], "is of another top_k, not 4"),
        (["--distillation.temperature", "1"], "is of another temperature, not 1"),
        (["--data.source", str(changed)], "is of another text, not this one"),
        (["--data.sequence-length", "8"], "is of another text, not this one"),
        (["--distillation.hidden", "1"], "keeps no hidden states: distillation.hidden must be 0"),
        (["--distillation.soft", "0"], "it needs distillation.top_k and soft"),
        (["--data.streaming"], "which data.streaming has not"),
        (["--distillation.cache", str(tmp_path)], "is not empty and has no lessons.json"),
    ):
        assert main([*student, *options]) == 2, options
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert said in shown
    assert not (tmp_path / "student").exists()
    # A copy of a teacher's folder is the same teacher; with one byte of its weights changed it is another.
    experiment, same = distilled(trained, kept), tmp_path / "same"
    shutil.copytree(trained, same)
    opened(dataclasses.replace(experiment, teacher=str(same)))
    weights = max((same / "checkpoints" / "40" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is of another teacher, not this one; choose another folder"):
        opened(dataclasses.replace(experiment, teacher=str(same)))
    record = json.loads((kept / "lessons.json").read_text())
    record["tokenizer"]["sha256"] = "other"
    shutil.copytree(kept, tmp_path / "kept")
    (tmp_path / "kept" / "lessons.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is of another tokenizer, not this one"):
        opened(distilled(trained, tmp_path / "kept"))
    masked, saved = dataclasses.replace(experiment, objective="masked-token"), load(trained, arrays=False)
    with pytest.raises(UserError, match="the masked-token objective hides other tokens at every step"):
        make_lessons(masked, saved, saved.tokenizer)


def test_the_likeliest_alone_would_mislead():
    """Where a student already says what its teacher says, nothing pulls it away; renormalised lessons would.

    They have their least at a student that gives nothing at all to other tokens.
    """
    logits = 2 * jax.random.normal(jax.random.key(0), (50,))
    ids, log_p = jax.jit(functools.partial(likeliest, temperature=1.0, top_k=8))(logits)

    def kept(student):
        return between(log_p, with_rest(jax.nn.log_softmax(student), ids), "forward-kl")

    def renormalised(student):
        return between(jax.nn.log_softmax(log_p[:-1]), jax.nn.log_softmax(student)[ids], "forward-kl")

    np.testing.assert_allclose(jax.jit(jax.grad(kept))(logits), 0, atol=1e-6)
    rest = float(np.exp(log_p[-1]))
    assert rest > 0.1
    pull = jax.jit(jax.grad(renormalised))(logits)
    others = np.delete(np.asarray(pull), np.asarray(ids))
    np.testing.assert_allclose(others.sum(), rest, rtol=1e-4)  # all that it gives to others is pushed down
