"""Training that begins with another run's model."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from phyla.cli import main
from phyla.compression.recipes import parse
from phyla.experiments import finetune_arguments
from phyla.models.errors import UserError
from phyla.training import run
from phyla.training.compress import compress_run
from phyla.training.loop import train
from phyla.training.saved import load
from phyla.training.start import start


def leaves(folder: Path) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_flatten_with_path(load(folder).params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def test_what_is_frozen_stays_in_the_base(trained, tmp_path):
    """Of a rounded model only norms and the like are trained, saved and resumed; the codes stay the base's."""
    base, out = tmp_path / "int8", tmp_path / "on"
    compress_run(trained, parse("int8"), base)
    options = ["--loop.steps", "6", "--loop.checkpoint-every", "2", "--optimizer.learning-rate", "0.1"]
    command = ["finetune", str(base), *options, "--out", str(out)]
    assert main([*command, "--max-steps", "4"]) == 0
    assert not (out / "checkpoints" / "4" / "frozen").exists()
    assert main(command) == 0
    assert run.read_record(out)["compression"] == "int8"
    before, after = leaves(base), leaves(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(
        "scale']" in name or "bias" in name or "A_log" in name or "D" in name or "conv" in name or "dt" in name
        for name in changed
    ), changed
    assert not [name for name in changed if "codes" in name]
    whole = tmp_path / "whole"
    assert main([*command[:-1], str(whole)]) == 0
    for name, leaf in leaves(whole).items():
        np.testing.assert_array_equal(leaf, after[name])


def test_all_of_a_run_is_trained_on(trained, tmp_path):
    """It begins with the run's loss, with the run's tokenizer."""
    before = json.loads((trained / "summary.json").read_text())["bits_per_byte"]
    experiment = load(trained).experiment
    loop = dataclasses.replace(experiment.loop, steps=1)
    optimizer = dataclasses.replace(experiment.optimizer, learning_rate=1e-9)
    experiment = dataclasses.replace(experiment, base=str(trained), loop=loop, optimizer=optimizer)
    summary = train(experiment, tmp_path / "on")
    assert summary is not None
    assert summary["bits_per_byte"] == pytest.approx(before, rel=1e-5)


def test_a_student_is_finetuned_without_its_teacher(trained, tmp_path):
    experiment = dataclasses.replace(load(trained).experiment, teacher="runs/gone")
    run.create(tmp_path / "student", experiment, None)
    asked = finetune_arguments([str(tmp_path / "student"), "lora-r2", "--loop.steps", "3"]).experiment
    assert (asked.teacher, asked.recipes, asked.loop.steps) == (None, "lora-r2", 3)
    assert asked.base == str(tmp_path / "student")


def test_what_cannot_be_a_base_or_a_recipe_is_refused(trained, tmp_path):
    experiment = load(trained).experiment
    other = dataclasses.replace(experiment, base=str(trained), model=dataclasses.replace(experiment.model, width=32))
    with pytest.raises(UserError, match="has another model"):
        start(other)
    with pytest.raises(UserError, match="gptq-int4 reads text: make a run of it first"):
        start(dataclasses.replace(experiment, recipes="gptq-int4"))
    assert main(["finetune", str(tmp_path)]) == 2
    assert main(["finetune"]) == 2
