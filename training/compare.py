"""The comparison: the same budget, the same tokens in the same order, one report.

    plan.json               what is compared, and how
    NAME-seedN/             the runs
    NAME-seed0-RECIPE/      the first of them compressed
    beside/RUN.json         what other runs are, beside it
    baselines.json          what n-grams and xz make of the same text
    results.jsonl           every measured figure
    report.html, report.md, *.png

Each piece is made once: an interrupted comparison continues where it was.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from phyla.compression.compress import abstract
from phyla.compression.recipes import parse
from phyla.compression.rule import Rule
from phyla.models import sizes
from phyla.models.errors import UserError, choose
from phyla.training import run, sharding
from phyla.training.baselines import baselines
from phyla.training.compress import COMPRESSION, compress_run, rows_beside
from phyla.training.config import Experiment
from phyla.training.data.sources import documents
from phyla.training.data.tokenizers import encode_prompt, make_tokenizer
from phyla.training.generate import Sampling, generate, until_end
from phyla.training.log import read
from phyla.training.loop import train
from phyla.training.machine import description
from phyla.training.progress import Reporter
from phyla.training.report import summary_table, write_report
from phyla.training.saved import load
from phyla.training.speed import measure

CALIBRATION_STEPS = 15
VALIDATIONS = 10
"""Points of a learning curve."""
PROMPT = "It was"
SAMPLE_TOKENS = 400


def compare(
    experiments: Sequence[Experiment],
    *,
    out: Path,
    parameters: int | None,
    seeds: int,
    tokens: int | None,
    budget_minutes: float | None,
    compress: Sequence[str] = (),
    beside: Sequence[Path] = (),
    json: Path | None = None,
) -> None:
    """Compares architectures into a folder, or continues what is there.

    Args:
        experiments: one for each architecture, on the same data in the same batches.
        out: the folder.
        parameters: of each model, within 1 %; None: as many as the first has.
        seeds: runs of each.
        tokens: trained on in each run; None: the first experiment's.
        budget_minutes: instead of `tokens`: minutes of training of the whole comparison on this machine.
        compress: recipes (`phyla compress --list`), each applied to the first seed of every architecture; a finished
            comparison can be given more of them.
        beside: runs of these architectures that were made otherwise (distilled, retrained, trained for quantization),
            to stand beside the compressed ones; a finished comparison can be given more of them.
        json: where plan and results also go, as one file.

    Raises UserError, before anything is trained, if the experiments or the folder do not fit.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {seeds}")
    if tokens is not None and budget_minutes is not None:
        raise UserError("--tokens and --budget-minutes exclude each other")
    if budget_minutes is not None and not budget_minutes > 0:
        raise UserError(f"--budget-minutes must be positive, not {budget_minutes}")
    recipes = {name: parse(name) for name in compress}
    experiments = _equal(experiments, parameters)
    _check_beside(beside, experiments)
    asked = {"parameters": parameters, "seeds": seeds, "tokens": tokens, "budget_minutes": budget_minutes}
    path = out / "plan.json"
    with Reporter() as reporter:
        _check_recipes(recipes, experiments, reporter)
        if path.exists():
            plan = _read_plan(out)
            _check_same(plan, experiments, asked, out)
        else:
            if out.is_dir() and any(child.name != "calibration" for child in out.iterdir()):
                raise UserError(f"{out} is not empty and holds no comparison; choose another --out")
            tokens = tokens or _tokens_in(budget_minutes, experiments, seeds, out, reporter)
            plan = _plan(experiments, asked, tokens, out)
        for key, more in (("compress", recipes), ("beside", map(str, beside))):
            plan[key] = [*plan[key], *(name for name in more if name not in plan[key])]
        _check_beside(map(Path, plan["beside"]), experiments)  # the earlier and the new ones
        run.write_json(path, plan)

        runs = [(experiment, seed) for seed in range(seeds) for experiment in experiments]
        jobs: list[tuple[str, Callable[[], object]]] = [
            ("baselines", lambda: _baselines(experiments[0], out)),
            *((f"train {e.name}", lambda e=e, s=s: _train(e, s, plan, out, reporter)) for e, s in runs),
            *((f"measure {e.name}", lambda e=e: _measure(e, out)) for e in experiments),
            *((f"{r}, {e.name}", lambda e=e, r=r: _compress(e, r, out)) for e in experiments for r in plan["compress"]),
            *((f"beside, {r}", lambda r=r: _beside(Path(r), experiments, out)) for r in plan["beside"]),
        ]
        with reporter.task("compare", len(jobs), "jobs") as task:
            for i, (name, job) in enumerate(jobs):
                task.update(i, name)
                job()
                write_results(out)
            task.update(len(jobs), "done")
    plan, records = read_results(out)
    if json is not None:
        run.write_json(json, {"plan": plan, "results": records})
    console = Console()
    console.print(summary_table(plan, records))
    console.print(f"{out / 'report.html'}", highlight=False, soft_wrap=True)


def read_results(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plan, and a record for each figure that exists so far."""
    plan = _read_plan(out)
    records: list[dict[str, Any]] = []
    if (out / "baselines.json").exists():
        found = loads((out / "baselines.json").read_text())
        records += [{"kind": "baseline", "name": name, "bits_per_byte": bits} for name, bits in found.items()]
    for name in plan["architectures"]:
        for seed in range(plan["seeds"]):
            folder = out / f"{name}-seed{seed}"
            if (folder / "summary.json").exists():
                records.append(_run_record(folder, name, seed))
        speed = out / f"{name}-seed0" / "speed.json"
        if speed.exists():
            records.append({"kind": "speed", "name": name, **loads(speed.read_text())})
        records += _compressed_records(out, name, plan)
    return plan, records


def _read_plan(out: Path) -> dict[str, Any]:
    return {"compress": [], "beside": []} | loads((out / "plan.json").read_text())


def write_results(out: Path) -> None:
    """results.jsonl and the report, from what exists so far."""
    plan, records = read_results(out)
    temporary = out / "results.jsonl.tmp"
    temporary.write_text("".join(dumps(record) + "\n" for record in records))
    temporary.replace(out / "results.jsonl")
    write_report(out, plan, records)


def _compressed_records(out: Path, name: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The model as it was trained, by each recipe that has been applied to it, and the runs beside it."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for recipe in plan["compress"]:
        path = _compressed_folder(out, name, recipe) / COMPRESSION
        if path.exists():
            first, *_, last = loads(path.read_text())["steps"]
            found.append((recipe, first, last))
    for folder in map(Path, plan["beside"]):
        path = _beside_file(out, folder)
        if path.exists():
            record = loads(path.read_text())
            found += [(folder.name, *record["rows"])] if record["architecture"] == name else []
    rows = [first | {"recipe": None} for _, first, _ in found[:1]]
    rows += [last | {"recipe": label} for label, _, last in found]
    return [{"kind": "compressed", "name": name} | row for row in rows]


def _compressed_folder(out: Path, name: str, recipe: str) -> Path:
    return out / f"{name}-seed0-{re.sub(r'[^A-Za-z0-9._+-]', '_', recipe)}"


def _beside_file(out: Path, folder: Path) -> Path:
    return out / "beside" / f"{folder.name}.json"


def _run_record(folder: Path, name: str, seed: int) -> dict[str, Any]:
    model = run.read_experiment(folder).model
    validations = [line for line in read(folder) if "validation_bits_per_byte" in line]
    glances = [line for line in validations if not line["whole_text"]]
    curve = [
        {name: line[name] for name in ("step", "tokens", "seconds")}
        | {"bits_per_byte": line["validation_bits_per_byte"]}
        for line in glances or validations  # points on the same text
    ]
    sample = folder / "sample.json"
    return {
        "kind": "run",
        **loads((folder / "summary.json").read_text()),
        "name": name,
        "seed": seed,
        "width": model.width,
        "layers": model.layers,
        "curve": curve,
        **(loads(sample.read_text()) if sample.exists() else {}),
    }


def _check_beside(folders: Iterable[Path], experiments: Sequence[Experiment]) -> None:
    """That they are runs of these architectures, each with a name of its own."""
    named: dict[str, Path] = {}
    for folder in folders:
        _architecture(folder, experiments)
        other = named.setdefault(folder.name, folder)
        if other != folder:
            raise UserError(f"--beside: {other} and {folder} have one name, and a row is named by it")


def _architecture(folder: Path, experiments: Sequence[Experiment]) -> str:
    """What a run is of, by its experiment's name: mamba-finetuned and mamba-of-transformer are of mamba."""
    name, names = run.read_experiment(folder).name, [experiment.name for experiment in experiments]
    of = [each for each in names if name.startswith(f"{each}-")]
    return max(of, key=len) if of else choose(f"architecture of {folder} in this comparison", name, names)


def _equal(experiments: Sequence[Experiment], parameters: int | None) -> list[Experiment]:
    """The experiments with the width that the budget gives them."""
    first = experiments[0]
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise UserError(f"an architecture is named twice: {', '.join(names)}")
    for experiment in experiments[1:]:
        for name in ("objective", "data", "mesh"):
            if getattr(experiment, name) != getattr(first, name):
                raise UserError(f"{experiment.name} and {first.name} differ in {name}: they cannot be compared")
        if experiment.loop.batch_size != first.loop.batch_size:
            raise UserError(f"{experiment.name} and {first.name} differ in loop.batch_size: they cannot be compared")
    tokenizer = make_tokenizer(first.data)
    experiments = [run.with_vocabulary(experiment, tokenizer) for experiment in experiments]
    parameters = parameters or sizes.count(experiments[0].model)
    return [dataclasses.replace(e, model=sizes.fit_width(e.model, parameters)) for e in experiments]


def _plan(experiments: list[Experiment], asked: dict[str, Any], tokens: int, out: Path) -> dict[str, Any]:
    first = experiments[0]
    names = [experiment.name for experiment in experiments]
    batch, length = first.loop.batch_size, first.data.sequence_length
    options = [f"--{name.replace('_', '-')} {value}" for name, value in asked.items() if value is not None]
    mesh = sharding.make_mesh(first.mesh, batch // first.loop.microbatches)
    steps = max(1, tokens // (batch * length))
    return {
        "architectures": names,
        "asked": asked,
        "parameters": asked["parameters"] or sizes.count(first.model),
        "seeds": asked["seeds"],
        "tokens": steps * batch * length,
        "steps": steps,
        "batch_size": batch,
        "sequence_length": length,
        "tokenizer": first.data.tokenizer,
        "data": first.data.source,
        "device": description(mesh),
        "phyla": importlib.metadata.version("phyla"),
        "git": run.git_sha(),
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "command": " ".join(["phyla compare", *names, *options, f"--out {out}"]),
        "date": datetime.date.today().isoformat(),
        "compress": [],
        "beside": [],
    }


def _check_same(plan: dict[str, Any], experiments: list[Experiment], asked: dict[str, Any], out: Path) -> None:
    now = {"architectures": [experiment.name for experiment in experiments], "asked": asked}
    for name, value in run.flatten(now).items():
        before = run.flatten(plan).get(name)
        if before != value:
            raise UserError(f"{out} holds a comparison with {name} = {before}, not {value}; choose another --out")


def _tokens_in(minutes: float | None, experiments: list[Experiment], seeds: int, out: Path, reporter: Reporter) -> int:
    """How many tokens each run can train on; from the first few steps of each if the budget is in minutes."""
    first = experiments[0]
    if minutes is None:
        return first.loop.steps * first.loop.batch_size * first.data.sequence_length
    seconds_per_token = 0.0
    for experiment in experiments:
        folder = out / "calibration" / experiment.name
        brief = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, log_every=5))
        train(brief, folder, max_steps=CALIBRATION_STEPS, reporter=reporter)
        seconds_per_token += seeds / read(folder)[-1]["tokens_per_second"]
    return int(60 * minutes / seconds_per_token)


def _train(experiment: Experiment, seed: int, plan: dict[str, Any], out: Path, reporter: Reporter) -> None:
    every = max(1, plan["steps"] // VALIDATIONS)
    loop = dataclasses.replace(
        experiment.loop, steps=plan["steps"], seed=seed, eval_every=every, checkpoint_every=every, keep=1
    )
    experiment = dataclasses.replace(experiment, loop=loop)
    if train(experiment, out / f"{experiment.name}-seed{seed}", reporter=reporter) is None:
        raise SystemExit(0)  # a SIGTERM: the run has saved itself, and the same command goes on from there


def _baselines(experiment: Experiment, out: Path) -> None:
    path = out / "baselines.json"
    if not path.exists():
        train_text, validation_text = (
            "".join(documents(experiment.data, split)).encode() for split in ("train", "validation")
        )
        run.write_json(path, baselines(train_text, validation_text))


def _measure(experiment: Experiment, out: Path) -> None:
    """Speed, state and a sample, of the first seed's run."""
    folder = out / f"{experiment.name}-seed0"
    if (folder / "speed.json").exists():
        return
    saved = load(folder)
    prompt = encode_prompt(saved.tokenizer, PROMPT)
    sampling = Sampling(temperature=0.8)
    tokens = generate(saved.graphdef, saved.params, [prompt], max_tokens=SAMPLE_TOKENS, sampling=sampling)[0]
    text = saved.tokenizer.decode(until_end(tokens, saved.tokenizer.eos_id))
    run.write_json(folder / "sample.json", {"prompt": PROMPT, "sample": text})
    run.write_json(folder / "speed.json", measure(saved))


def _beside(folder: Path, experiments: Sequence[Experiment], out: Path) -> None:
    """Of the run's architecture the first seed's run is what it stands beside."""
    path = _beside_file(out, folder)
    if path.exists():
        return
    name = _architecture(folder, experiments)
    tokens = experiments[0].loop.eval_tokens
    rows = rows_beside(load(out / f"{name}-seed0"), load(folder), tokens)
    path.parent.mkdir(exist_ok=True)
    run.write_json(path, {"architecture": name, "run": str(folder), "rows": rows})


def _check_recipes(
    recipes: Mapping[str, Sequence[Rule]], experiments: Sequence[Experiment], reporter: Reporter
) -> None:
    """Refuses what changes nothing in one of the models."""
    pairs = list(itertools.product(experiments, recipes.items()))
    if not pairs:
        return
    with reporter.task("compare", len(pairs), "recipes checked") as task:
        for i, (experiment, (name, recipe)) in enumerate(pairs):
            task.update(i, f"{name}, {experiment.name}")
            try:
                abstract(experiment.model, recipe)
            except UserError as error:
                raise UserError(f"{experiment.name}: {error}") from None
        task.update(len(pairs), "done")


def _compress(experiment: Experiment, recipe: str, out: Path) -> None:
    """Of the first seed's run; one that was interrupted is made again."""
    folder = _compressed_folder(out, experiment.name, recipe)
    if (folder / COMPRESSION).exists():
        return
    if folder.exists():
        shutil.rmtree(folder)
    compress_run(
        out / f"{experiment.name}-seed0",
        parse(recipe),
        folder,
        speed=True,
        validation_tokens=experiment.loop.eval_tokens,
    )
