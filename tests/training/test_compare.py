"""The comparison, whole and small: equal budgets, equal data, interrupted and continued, nothing made twice."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from phyla.models import sizes
from phyla.models.config import BlockConfig
from phyla.models.errors import UserError
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import MLPConfig
from phyla.training import compare as module
from phyla.training import compress, run, speed
from phyla.training.compare import compare, read_results
from phyla.training.log import read


@pytest.fixture
def experiments(experiment, monkeypatch):
    """One with attention, one with Mamba, of a few steps."""
    monkeypatch.setattr(speed, "CONTEXTS", (8, 16))
    monkeypatch.setattr(module, "SAMPLE_TOKENS", 8)
    monkeypatch.setattr(compress, "CONTEXT", 8)
    attention = BlockConfig(mixer=AttentionConfig(heads=2, head_dim=8), channel=MLPConfig())
    mamba = BlockConfig(mixer=MambaConfig(state=4))
    loop = dataclasses.replace(experiment.loop, steps=20)

    def named(name: str, block: BlockConfig):
        model = dataclasses.replace(experiment.model, pattern=(block,), width=160)
        return dataclasses.replace(experiment, name=name, model=model, loop=loop)

    return [named("attention", attention), named("mamba", mamba)]


OPTIONS: dict[str, Any] = {"parameters": 260_000, "seeds": 2, "tokens": None, "budget_minutes": None}


def test_a_comparison_from_start_to_end(experiments, tmp_path, monkeypatch):
    out = tmp_path / "compare"

    # Interrupted after the second training …
    trained = []
    original = module.train

    def interrupted(experiment, folder, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(folder)
        return original(experiment, folder, **options)

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(experiments, out=out, **OPTIONS)
    assert "mamba" in (out / "report.md").read_text()  # a report of what there is
    records = read_results(out)[1]
    assert sum(record["kind"] == "run" for record in records) == 2

    # … and continued: what is finished stays as it is.
    monkeypatch.setattr(module, "train", original)

    def made(*names):
        return {path: path.stat().st_mtime_ns for name in names for path in out.rglob(name)}

    before = made("summary.json", "baselines.json")
    assert len(before) == 3
    compare(experiments, out=out, **OPTIONS)
    assert before.items() <= made("summary.json", "baselines.json").items()
    before = made("speed.json", "sample.json")
    module._measure(experiments[0], out)
    assert before == made("speed.json", "sample.json")
    records = read_results(out)[1]
    runs = [record for record in records if record["kind"] == "run"]
    assert [(r["name"], r["seed"]) for r in runs] == [(n, s) for n in ("attention", "mamba") for s in (0, 1)]
    assert len(list(map(json.loads, (out / "results.jsonl").read_text().splitlines()))) == len(records)
    for path in ("report.html", "report.md"):
        assert (out / path).exists()

    # The same budget, the same tokens in the same order, other seeds.
    assert all(abs(r["parameters"] / 260_000 - 1) <= 0.01 for r in runs)
    assert {(r["steps"], r["tokens"]) for r in runs} == {(20, runs[0]["tokens"])}
    tokens = {r["name"]: [line["tokens"] for line in read(out / f"{r['name']}-seed0")] for r in runs}
    assert tokens["attention"] == tokens["mamba"]
    # The batches are a function of these (test_data_pipeline.py).
    kept = {path.parent.name: run.read_experiment(path.parent) for path in out.glob("*-seed*/config.json")}
    for seed in (0, 1):
        one, other = (kept[f"{name}-seed{seed}"] for name in ("attention", "mamba"))
        assert (one.data, one.loop, one.mesh) == (other.data, other.loop, other.mesh)
        assert one.loop.seed == seed
    assert runs[0]["bits_per_byte"] != runs[1]["bits_per_byte"]
    assert all(len(r["curve"]) == 10 for r in runs)
    state = {record["name"]: record["state_bytes"] for record in records if record["kind"] == "speed"}
    assert state["mamba"][0] == state["mamba"][1]
    assert state["attention"][0] < state["attention"][1]
    assert {r["name"] for r in records if r["kind"] == "baseline"} >= {"1-gram", "3-gram", "xz"}

    # A finished comparison is given a recipe.
    compare(experiments, out=out, compress=("int8",), **OPTIONS)
    versions = [record for record in read_results(out)[1] if record["kind"] == "compressed"]
    assert [(v["name"], v["recipe"]) for v in versions] == [
        (n, r) for n in ("attention", "mamba") for r in (None, "int8")
    ]
    assert versions[1]["bytes_in_memory"] < versions[0]["bytes_in_memory"] / 3
    assert all(version["decode"] > 0 for version in versions)
    assert "int8" in (out / "report.md").read_text()
    assert (out / "compressed.png").exists()

    # And a run that was made otherwise.
    other = out / "mamba-seed1"
    compare(experiments, out=out, beside=(other,), **OPTIONS)
    versions = {(r["name"], r["recipe"]): r for r in read_results(out)[1] if r["kind"] == "compressed"}
    assert list(versions)[2:] == [("mamba", None), ("mamba", "int8"), ("mamba", "mamba-seed1")]
    found, first = versions["mamba", "mamba-seed1"], versions["mamba", None]
    assert found["parameters"] == first["parameters"]
    assert found["kl"] > 0
    assert found["decode"] > 0
    for version, folder in ((first, "mamba-seed0"), (found, "mamba-seed1")):
        trained = json.loads((out / folder / "summary.json").read_text())["bits_per_byte"]
        np.testing.assert_allclose(version["bits_per_byte"], trained, rtol=1e-6)
    with pytest.raises(UserError, match=r"no architecture of .*mamba-seed1 in this comparison 'mamba'; nearest"):
        compare(experiments[:1], out=tmp_path / "other", beside=(other,), **OPTIONS)

    more: dict[str, Any] = OPTIONS | {"seeds": 3}
    with pytest.raises(UserError, match=r"asked\.seeds = 2, not 3"):
        compare(experiments, out=out, **more)


def test_a_budget_in_minutes_becomes_tokens(experiments, tmp_path, monkeypatch):
    speeds = {"attention": 1000.0, "mamba": 500.0}

    def calibrate(experiment, folder, **options):
        assert options["max_steps"] == module.CALIBRATION_STEPS
        run.write_json(folder / "x", {})
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 15, "tokens_per_second": speeds[experiment.name]}) + "\n"
        )

    monkeypatch.setattr(module, "train", calibrate)
    tokens = module._tokens_in(2.0, experiments, 3, tmp_path, None)  # pyright: ignore[reportArgumentType]
    # 3 seeds × tokens × (1/1000 + 1/500) seconds = 120 seconds.
    np.testing.assert_allclose(tokens, 120 / 3 / 0.003, atol=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"tokens": 10, "budget_minutes": 1.0}, "exclude each other"),
        ({"budget_minutes": 0.0}, "--budget-minutes must be positive"),
        ({"parameters": 10}, "no model.width"),
        ({"compress": ("int8", "prune-neurons-25%")}, "^mamba: .*prune-neurons"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(experiments, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        compare(experiments, out=tmp_path / "compare", **(OPTIONS | change))
    assert not (tmp_path / "compare").exists()


def test_what_cannot_be_compared_is_refused(experiments, tmp_path):
    first, second = experiments
    longer = dataclasses.replace(second, data=dataclasses.replace(second.data, sequence_length=32))
    with pytest.raises(UserError, match="differ in data"):
        compare([first, longer], out=tmp_path / "compare", **OPTIONS)
    with pytest.raises(UserError, match="named twice"):
        compare([first, first], out=tmp_path / "compare", **OPTIONS)


def test_the_count_of_the_first_is_the_default_budget(experiments):
    first, second = module._equal(experiments, None)
    count = sizes.count(first.model)
    assert first.model.width == experiments[0].model.width
    assert abs(sizes.count(second.model) / count - 1) <= 0.01


def test_what_stands_beside_is_of_the_architecture_that_its_name_begins_with(experiments, tmp_path):
    def named(folder: str, name: str):
        run.create(tmp_path / folder, dataclasses.replace(experiments[0], name=name), None)
        return tmp_path / folder

    assert module._architecture(named("a", "mamba-finetuned"), experiments) == "mamba"
    assert module._architecture(named("b", "attention-of-mamba"), experiments) == "attention"
    with pytest.raises(UserError, match=r"no architecture of .* 'mambas'; nearest: mamba"):
        module._architecture(named("c", "mambas"), experiments)
    with pytest.raises(UserError, match="have one name"):
        module._check_beside([tmp_path / "a", named("other/a", "mamba")], experiments)
