"""Adapters as Hugging Face's PEFT keeps them: adapter_config.json beside adapter_model.safetensors.

LoRA (rank-stabilised, DoRA) and IA3, where the family's table has one of their matrices for each of ours: Llama and its
kin. Their A is [r, in] and their B [out, r]; IA3's factors are [1, in] or [out, 1].
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phyla.compression.adapters import LowRank, Rescale
from phyla.compression.compress import compress
from phyla.compression.matrices import dotted, weights
from phyla.compression.rule import Rule, exactly
from phyla.models import formats
from phyla.models.adapted import IA3, Adapter, DoRA, LoRA
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.folder import read_json
from phyla.models.formats.source import place
from phyla.models.formats.table import Format
from phyla.training import run
from phyla.training.adapters import save_on_base
from phyla.training.saved import load

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Module(NamedTuple):
    """A linear map of theirs."""

    name: str
    path: str
    """Of our weight."""
    layer: int | None
    """Its index in the stack."""


def modules(layout: Format, model: ModelConfig) -> Iterator[Module]:
    """Those that are one matrix of ours each, transposed."""
    probe = np.arange(6).reshape(2, 3)
    for entry in layout.entries(model):
        ours, theirs = entry.ours[0], entry.theirs[0]
        if len(entry.ours) > 1 or len(entry.theirs) > 1 or not ours.endswith(".weight"):
            continue
        if theirs.endswith(".weight") and np.array_equal(entry.write(probe)[0], probe.T):
            yield Module(theirs.removesuffix(".weight"), *place(model, ours))


def export_peft(folder: Path, out: Path) -> None:
    """Writes the adapter of a run, that its last recipe has made, for PEFT to load onto the exported base.

    Raises UserError if it has none that PEFT knows, or one on a matrix that their format does not have by itself.
    """
    run.check_new(out)
    found = load(folder)
    rule = found.recipes[-1] if found.recipes else None
    if not isinstance(rule, LowRank | Rescale) or (isinstance(rule, LowRank) and rule.kind == "pissa"):
        raise UserError(f"{folder}: PEFT takes LoRA, DoRA and IA3, and this run ends with {rule or 'no adapter'}")
    layout = formats.fitting(found.experiment.model)
    held = {dotted(path): each for path, each in weights(found.model()).items() if isinstance(each, Adapter)}
    known = list(modules(layout, found.experiment.model))
    if strange := sorted(held.keys() - {module.path for module in known}):
        raise UserError(f"{strange[0]} is no linear map by itself in the format {layout.name}: PEFT cannot adapt it")
    tensors, fed = {}, set()
    for module in known:
        if (weight := held.get(module.path)) is None:
            continue
        for name, array in _tensors(weight, module.layer).items():
            tensors[f"{PREFIX}{module.name}.{name}"] = np.ascontiguousarray(array)
        if isinstance(weight, IA3) and weight.inputs:
            fed.add(module.name.rpartition(".")[2])
    names = {module.name for module in known if module.path in held}
    ends = {name.rpartition(".")[2] for name in names}
    whole = all(module.name in names for module in known if module.name.rpartition(".")[2] in ends)
    config: dict[str, Any] = {
        "base_model_name_or_path": found.experiment.base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(ends if whole else names),
        "fan_in_fan_out": False,
    }
    if isinstance(rule, LowRank):
        alpha = int(rule.alpha) if rule.alpha == int(rule.alpha) else rule.alpha
        config |= {"peft_type": "LORA", "r": rule.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
        config |= {"use_rslora": rule.kind == "rslora", "use_dora": rule.kind == "dora"}
    else:
        config |= {"peft_type": "IA3", "feedforward_modules": sorted(fed)}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    run.write_json(out / CONFIG, config)


def _tensors(weight: Adapter, index: int | None) -> dict[str, np.ndarray]:
    def of(parameter: nnx.Variable) -> np.ndarray:
        array = np.asarray(parameter[...], np.float32)
        return array if index is None else array[index]

    match weight:
        case IA3():
            return {"ia3_l": of(weight.factor)[None] if weight.inputs else of(weight.factor)[:, None]}
        case LoRA():
            found = {"lora_A.weight": of(weight.A).T, "lora_B.weight": of(weight.B).T}
            return found | ({"lora_magnitude_vector": of(weight.magnitude)} if isinstance(weight, DoRA) else {})
    raise AssertionError(weight)


def import_peft(source: Path, base: Path, out: Path) -> None:
    """Makes a run of a PEFT adapter on a run's model, in which only the adapter is saved.

    Raises UserError if the folder says something that is not supported, or has a tensor that the base has no place for.
    """
    run.check_new(out)
    config = read_json(source / CONFIG)
    try:
        tensors = load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source / WEIGHTS} is not a safetensors file: {error}") from error
    saved = load(base)
    layout = formats.fitting(saved.experiment.model)
    left = set(tensors)
    targets = {module: f"{PREFIX}{module.name}." for module in modules(layout, saved.experiment.model)}
    found = {module: prefix for module, prefix in targets.items() if any(name.startswith(prefix) for name in tensors)}
    rule = _rule(source, config, {module.path for module in found})
    experiment = dataclasses.replace(saved.experiment, name=source.resolve().name, base=str(base), recipes=str(rule))
    model = compress(saved.model(), (rule,), seed=experiment.loop.seed)[-1].model
    held = {dotted(path): each for path, each in weights(model).items() if isinstance(each, Adapter)}
    for module, prefix in found.items():
        for name, like in _tensors(held[module.path], module.layer).items():
            key = prefix + name
            if key not in tensors or tensors[key].shape != like.shape:
                raise UserError(f"{source}: no {key} of shape {list(like.shape)}, in every layer")
            left.remove(key)
            _set(held[module.path], module.layer, name, tensors[key])
    if left:
        raise UserError(f"{source}: {min(left)} has no place in {base}")
    save_on_base(out, experiment, saved, (rule,), model)


def _rule(source: Path, config: dict, paths: set[str]) -> Rule:
    """The recipe that makes room for it."""
    refused = {"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None}
    refused |= {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "use_qalora": False, "use_bdlora": False}
    refused |= {"layer_replication": None, "alora_invocation_tokens": None, "trainable_token_indices": None}
    for flag, value in refused.items():
        if config.get(flag, value) not in (value, None):
            raise UserError(f"{source / CONFIG}: {flag} is {json.dumps(config[flag])}; supported: {json.dumps(value)}")
    if not paths:
        raise UserError(f"{source} adapts no matrix of this base")
    only = exactly(sorted(paths))
    match config.get("peft_type"):
        case "LORA":
            kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
            return LowRank(kind=kind, rank=config["r"], alpha=float(config["lora_alpha"]), only=only)
        case "IA3":
            return Rescale(only=only)
    raise UserError(f"{source / CONFIG}: peft_type is {config.get('peft_type')!r}; supported: 'LORA', 'IA3'")


def _set(weight: Adapter, index: int | None, name: str, value: np.ndarray) -> None:
    part = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude", "ia3_l": "factor"}[name]
    parameter: nnx.Variable = getattr(weight, part)
    array = jnp.asarray(value.ravel() if part == "factor" else value.T, jnp.float32)
    parameter[...] = array if index is None else parameter[...].at[index].set(array)
