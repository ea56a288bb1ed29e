"""Hugging Face folders: config.json beside safetensors, in one file or in shards with an index. Never a pickle."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.source import Shapes, Source, checkpoint_shapes, parameter_shapes, tensors
from phyla.models.formats.table import Format
from phyla.models.serialization import to_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
FLOATS = ("F32", "F16", "BF16")


def refuse_pickle(path: Path) -> None:
    """Raises UserError with the reason."""
    raise UserError(
        f"{path} is a pickle, which can run any program when it is opened; only safetensors are read "
        "(convert it where you trust it: safetensors.torch.save_file)"
    )


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_hook=_floats)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object")
    return data


def _floats(data: dict) -> Any:
    """{"__float__": "Infinity"}: how transformers 5 writes what JSON has no number for."""
    return float(data["__float__"]) if data.keys() == {"__float__"} else data


class Safetensors:
    """Tensors in one file or several, which are read and not mapped: the pages of a mapped file count as memory."""

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        for path in _files(folder):
            try:
                with safe_open(path, "numpy", backend="pread") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        if name in self.files:
                            raise UserError(f"{folder}: tensor {name} is in {self.files[name].name} and {path.name}")
                        view = file.get_slice(name)
                        self.files[name], self.shapes[name] = path, tuple(view.get_shape())
                        self.dtypes[name] = view.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a safetensors file: {error}") from error
        if (index := folder / INDEX).exists():
            for name, file in _weight_map(index).items():
                if self.files.get(name) != folder / file:
                    raise UserError(f"{index} says that {name} is in {file}; it is not")

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32. Raises UserError if it does not hold floating-point numbers."""
        if self.dtypes[name] not in FLOATS:
            raise UserError(f"{self.files[name]}: tensor {name} is {self.dtypes[name]}; supported: {', '.join(FLOATS)}")
        with safe_open(self.files[name], "numpy", backend="pread") as file:
            return file.get_tensor(name).astype(np.float32, copy=False)


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise UserError(f"{index} has no weight_map")
    return found


def _files(folder: Path) -> list[Path]:
    if (index := folder / INDEX).exists():
        paths = [folder / name for name in sorted(set(_weight_map(index).values()))]
    elif (folder / WEIGHTS).exists():
        paths = [folder / WEIGHTS]
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) > 1:
            raise UserError(f"{folder} has {len(paths)} safetensors files and no {INDEX}")
    if not paths:
        for path in sorted(folder.iterdir()):
            if path.suffix in PICKLES:
                refuse_pickle(path)
        raise UserError(f"{folder} has no {WEIGHTS}")
    for path in paths:
        if not path.exists():
            raise UserError(f"{folder} has no {path.name}, which {INDEX} names")
    return paths


def open_folder(folder: Path, named: Any) -> Source:
    """Opens a folder.

    Args:
        folder: config.json and safetensors.
        named: the `Format` of a `model_type`; raises UserError for an unknown one.

    Raises UserError for a flag, a tensor or a file that does not fit, naming it.
    """
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} has no {CONFIG}")
    raw = read_json(folder / CONFIG)
    if "model_type" not in raw:
        raise UserError(f"{folder / CONFIG} has no model_type")
    layout: Format = named(raw["model_type"])
    stored = Safetensors(folder)
    try:
        model = layout.config(layout.complete(raw, stored.shapes))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    entries = list(layout.entries(model))
    known = {name for entry in entries for name in entry.theirs}

    def canonical(name: str) -> str:
        full = layout.optional_prefix + name
        return full if name not in known and full in known else name

    names = {canonical(name): name for name in stored.shapes}
    if layout.tied and model.tie_embeddings and layout.tied[0] in names.keys() - known:
        head, embedding = (names.pop(layout.tied[0]), names.get(layout.tied[1]))
        if embedding is not None and not np.array_equal(stored.read(head), stored.read(embedding)):
            raise UserError(f"{folder}: {head} differs from {embedding}, but the configuration ties them")
    unused = {name for name in names.keys() - known if any(re.fullmatch(each, name) for each in layout.buffers)}
    names = {name: actual for name, actual in names.items() if name not in unused}
    shapes = {name: stored.shapes[actual] for name, actual in names.items()}
    return Source(folder, model, entries, shapes, lambda name: stored.read(names[name]))


RESOLVED = ("expand", "head_dim", "kv_heads", "dt_rank", "groups")
"""Fields that parameter shapes show: a format may say them in other words (None, a ratio, a width)."""
IMMATERIAL = ("dtype", "remat", "balance_loss", "z_loss", "input_bias")
"""Fields that change training or initialisation, but no result of given parameters beyond rounding."""


def check_expressible(layout: Format, model: ModelConfig) -> dict:
    """config.json of the model. Raises UserError naming a field that the format cannot say."""
    try:
        raw = layout.to_config(model)
        back = layout.config(json.loads(json.dumps(raw)))
    except UserError as error:
        raise UserError(f"the format {layout.name} does not fit: {error}") from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # its blocks are of another kind
        raise UserError(f"the format {layout.name} has other blocks than this model") from error
    if parameter_shapes(back) != parameter_shapes(model):
        raise UserError(f"a {layout.name} model has no such parameters")
    for name, ours, theirs in _differences(to_json(model), to_json(back), "model"):
        if name.rpartition(".")[2] not in RESOLVED + IMMATERIAL:
            raise UserError(f"the format {layout.name} cannot say {name} = {ours} (it would be {theirs})")
    return raw


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for name in ours:
            yield from _differences(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{where}.{i}")
    elif ours != theirs:
        yield where, ours, theirs


def write_folder(
    folder: Path,
    layout: Format,
    model: ModelConfig,
    parameters: Mapping[str, np.ndarray],
    *,
    flags: Mapping[str, Any] | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes config.json and the tensors, float32, in shards of at most `shard_bytes` (or one tensor).

    Args:
        folder: a new or empty one.
        layout: the format.
        model: what it is of.
        parameters: by path, stacked.
        flags: more of config.json, such as the ids of special tokens.
        shard_bytes: the largest file.

    Raises UserError if the folder has files, or if the format cannot say what the model is.
    """
    raw = check_expressible(layout, model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    entries = list(layout.entries(model))
    nbytes = {name: 4 * int(np.prod(shape)) for name, shape in checkpoint_shapes(model, entries).items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in nbytes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    stream = tensors(model, entries, parameters)
    weight_map = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        found = dict(next(stream) for _ in names)
        assert list(found) == names
        save_file(
            {name: np.ascontiguousarray(x, np.float32) for name, x in found.items()}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map})
    _write_json(folder / CONFIG, {"model_type": layout.name, "dtype": "float32", **raw, **(flags or {})})


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
