"""Adapters trained beside a run that stays as it is, saved by themselves, merged."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from phyla.cli import main
from phyla.compression.compress import compress
from phyla.compression.matrices import weights
from phyla.compression.recipes import parse
from phyla.models.adapted import Adapter
from phyla.models.errors import UserError
from phyla.training.compress import compress_run
from phyla.training.convert import dense_parameters
from phyla.training.saved import load
from phyla.training.start import start, what_is_trained

FEW = ["--loop.steps", "4", "--loop.checkpoint-every", "2", "--loop.eval-every", "4"]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bits(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["bits_per_byte"]


@pytest.fixture(scope="module")
def lora(trained, tmp_path_factory) -> Path:
    """Continued once."""
    out = tmp_path_factory.mktemp("adapters") / "lora"
    command = ["finetune", str(trained), "lora-r1", *FEW, "--optimizer.learning-rate", "0.003", "--out", str(out)]
    assert main([*command, "--max-steps", "2"]) == 0
    assert main(command) == 0
    return out


def test_only_the_adapter_is_saved(trained, lora):
    """A hundred numbers, not the base's thousands; loaded, it is the base and they."""
    items = lora / "checkpoints" / "4"
    assert not (items / "frozen").exists()
    model, base = load(lora).model(), load(trained).model()
    held: Any = [each for each in weights(model).values() if isinstance(each, Adapter)]
    assert held
    numbers = sum(each.A.size + each.B.size for each in held)
    saved = json.loads((items / "params" / "_METADATA").read_text())["tree_metadata"]
    assert sum(int(np.prod(each["value_metadata"]["write_shape"])) for each in saved.values()) == numbers
    whole = size(trained / "checkpoints" / "40" / "params")
    assert size(items / "params") < whole - 4 * (sum(x.size for x in jax.tree.leaves(base)) - 8 * numbers)
    for path, each in weights(base).items():
        mine: Any = weights(model)[path]  # a Param, or a weight
        assert isinstance(each, nnx.Param)
        mine = mine.body if isinstance(mine, Adapter) else mine
        np.testing.assert_array_equal(mine[...], each[...])
    assert bits(lora) < json.loads((trained / "summary.json").read_text())["bits_per_byte"]


def test_merged_it_gives_the_same_answers(lora, tmp_path):
    record = compress_run(lora, parse("merge"), tmp_path / "merged")
    before, after = record["steps"]
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=1e-5)
    assert after["kl"] < 1e-6
    assert not record["notes"]
    merged = load(tmp_path / "merged").model()
    assert not any(isinstance(each, Adapter) for each in weights(merged).values())


def test_a_run_says_what_it_trains(lora):
    said = what_is_trained(start(load(lora).experiment).abstract())
    assert "has an adapter on" in said
    assert "100 % of attention" in said
    assert "0 % of embedding" in said


def test_two_adapters_in_one_run_and_exports_without_a_matrix_are_refused(trained, lora):
    with pytest.raises(UserError, match="ia3 would freeze what lora-r1 learns"):
        start(dataclasses.replace(load(lora).experiment, recipes="lora-r1+ia3"))
    with pytest.raises(UserError, match="adapters that are no matrices"):
        dense_parameters(compress(load(trained).model(), parse("state"))[-1].model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nf4+lora-r1", "pissa-r1", "dora-r1", "ia3", "pfeiffer-2", "bitfit", "prefix-2", "prompt-2"]
)
def test_every_adapter_is_trained_resumed_and_loaded(trained, tmp_path, name):
    command = ["finetune", str(trained), name, *FEW, "--optimizer.learning-rate", "0.05"]
    assert main([*command, "--out", str(tmp_path / "on"), "--max-steps", "2"]) == 0
    assert main([*command, "--out", str(tmp_path / "on")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert bits(tmp_path / "on") == bits(tmp_path / "whole")
    assert (tmp_path / "on" / "checkpoints" / "4" / "frozen").exists() == name.startswith("nf4")
    assert main(["evaluate", str(tmp_path / "on"), "--json", str(tmp_path / "loss.json")]) == 0
    found = json.loads((tmp_path / "loss.json").read_text())["bits_per_byte"]
    assert found == pytest.approx(bits(tmp_path / "on"), rel=1e-6)
    assert main(["generate", str(tmp_path / "on"), "--prompt", "the ", "--max-tokens", "4"]) == 0
