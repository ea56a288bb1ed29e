"""`phyla distill`: what is copied of the teacher, students that are runs, the text it says, recipes and stages."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from phyla.cli import main
from phyla.compression.compress import abstract
from phyla.compression.recipes import parse
from phyla.experiments import distill_arguments
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.training import run
from phyla.training.config import DISTILLATIONS, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig
from phyla.training.data.sources import documents
from phyla.training.loop import train
from phyla.training.saved import load
from phyla.training.step import split
from phyla.training.transfer import initialise_from
from tests.training.test_distillation import ATTENTION, model_of, teacher


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
