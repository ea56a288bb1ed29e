"""The run directory: what was asked for, and everything that came of it.

config.json       the resolved experiment, its hash, the git SHA, the package versions, the tokenizer's fingerprint,
                  and by which recipes the model was compressed, if it was
tokenizer/        the tokenizer
checkpoints/      one folder a step
weights.huffman   the codes of a compressed run's checkpoint, if they are written so
metrics.jsonl     one line for each logged step and each validation
summary.json      once training has ended
compression.json  of a compressed run: what each recipe did, and what it cost
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phyla.compression.recipes import parse
from phyla.compression.rule import Rule
from phyla.models.errors import UserError
from phyla.models.serialization import from_json, to_json
from phyla.training.config import Experiment
from phyla.training.data.tokenizers import Tokenizer

PACKAGES = ("phyla", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers", "numpy")


def identity(experiment: dict) -> dict[str, Any]:
    """What makes a run the run it is, by dotted names: everything but the mesh, which says where it is computed."""
    return flatten({name: value for name, value in experiment.items() if name != "mesh"})


def config_hash(experiment: Experiment) -> str:
    """Twelve hexadecimal digits that change with any field but the mesh."""
    text = json.dumps(identity(to_json(experiment)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def default_folder(experiment: Experiment) -> Path:
    """runs/NAME-HASH: the same command continues the same run."""
    return Path("runs") / f"{experiment.name}-{config_hash(experiment)[:6]}"


def write_json(path: Path, data: Any) -> None:
    """Writes the whole file or leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def git_sha() -> str | None:
    """Of the code that runs, with `-dirty` if it has uncommitted changes; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def create(folder: Path, experiment: Experiment, fingerprint: dict | None, *, compression: Sequence[Rule] = ()) -> None:
    """Writes config.json; if there is one, it must be of the same experiment, on whatever mesh.

    `compression` is all that was done to the model, before this run too.

    Raises UserError, naming the first field that differs, if the folder holds another experiment, or a compressed run.
    """
    path, done = folder / "config.json", "+".join(map(str, compression)) or None
    if path.exists():
        record = json.loads(path.read_text())
        if record["compression"] != done:
            raise UserError(
                f"{folder} holds a run compressed by {record['compression']}, which is not trained on in place; "
                f"phyla finetune {folder} makes a new one of it"
            )
        before = identity(record["experiment"])
        now = identity(to_json(experiment))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{folder} holds a run with {name} = {before.get(name)}, not {now.get(name)}; choose another --out"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")
    record = {
        "experiment": to_json(experiment),
        "hash": config_hash(experiment),
        "git": git_sha(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "tokenizer": fingerprint,
        "compression": done,
    }
    write_json(path, record)


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """A JSON tree as dotted names and values."""
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = ((str(i), value) for i, value in enumerate(data))
    else:
        return {prefix: data}
    return {k: v for name, value in items for k, v in flatten(value, f"{prefix}.{name}" if prefix else name).items()}


def read_record(folder: Path) -> dict:
    """config.json of a run. Raises UserError if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no config.json{_nearest(folder)}")
    return json.loads(path.read_text())


def read_experiment(folder: Path) -> Experiment:
    """The resolved experiment of a run. Raises UserError if there is none."""
    return from_json(Experiment, read_record(folder)["experiment"], "config.json")


def read_recipes(folder: Path) -> tuple[Rule, ...]:
    """By which a run's model was compressed; none: as it was trained."""
    done = read_record(folder)["compression"]
    return parse(done) if done else ()


def check_new(folder: Path) -> None:
    """Raises UserError if it is anything but a new or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder")


def _nearest(folder: Path) -> str:
    found = sorted(path.parent for path in folder.parent.glob("*/config.json"))
    return f"; there: {', '.join(map(str, found[:5]))}" if found else ""


def with_vocabulary(experiment: Experiment, tokenizer: Tokenizer) -> Experiment:
    """The experiment with the tokenizer's vocabulary (and mask, if it hides tokens).

    Raises UserError if the model has a smaller vocabulary.
    """
    model, vocab_size = experiment.model, tokenizer.vocab_size
    if experiment.objective == "masked-token":
        vocab_size = max(vocab_size, tokenizer.mask_id + 1)
    if model.vocab_size is None:
        return dataclasses.replace(experiment, model=dataclasses.replace(model, vocab_size=vocab_size))
    if model.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's; nearest: {vocab_size}")
    return experiment
