"""Several adapters of one base: put onto it one after the other, or averaged."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from phyla.compression.adapters import PART, LowRank
from phyla.compression.few import Begin
from phyla.compression.matrices import dotted, weights
from phyla.compression.recipes import parse
from phyla.compression.rule import Rule, exactly
from phyla.models.adapted import LoRA
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.training import run, sharding
from phyla.training.checkpoints import Checkpoints, whole_step, with_shardings
from phyla.training.config import Experiment
from phyla.training.saved import Saved, load, prepared
from phyla.training.step import split

LINEAR = ("lora", "rslora", "pissa")
"""Kinds of `LowRank` that add a product to the base, so that their mean is one of a larger rank."""


def on_base(folder: Path, base: Saved) -> LanguageModel:
    """The model of a run on a base that is in memory already, whose arrays it shares; the base stays as it is.

    Raises UserError if the run began with another base.
    """
    experiment = run.read_experiment(folder)
    if experiment.base is None or Path(experiment.base).resolve() != base.folder.resolve():
        raise UserError(f"{folder} is not of the base {base.folder}, but {experiment.base or 'a model by itself'}")
    graphdef, params, frozen = split(prepared(base.model(), experiment))
    abstract = with_shardings(params, sharding.shardings(params, base.mesh))
    with Checkpoints(folder) as checkpoints:
        step = whole_step(checkpoints, folder)
        item = "ema" if checkpoints.has(step, "ema") else "params"
        return nnx.merge(graphdef, checkpoints.restore_params(step, abstract, item), frozen)


def average(folders: Sequence[Path], out: Path, *, weights: Sequence[float] | None = None) -> None:
    """Makes a run of the weighted mean of runs of one base, in which only the mean adapter is saved.

    The mean of LoRA, rank-stabilised or PiSSA adapters, of whatever ranks and matrices, is exactly that of the models:
    a LoRA with all their factors side by side. Of other recipes, which must be the same, it is the mean of what was
    trained (for IA3, BitFit, learned states, prompts and subspaces also that of what they do). A network that a prefix
    or a prompt was trained through is left out, also of one run alone.

    Args:
        folders: the runs.
        out: a new or empty folder.
        weights: of the runs, divided by their sum; None: all the same.

    Raises UserError if the runs have no mean.
    """
    run.check_new(out)
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if len(weights) != len(folders):
        raise UserError(f"{len(weights)} weights for {len(folders)} runs")
    if not math.isfinite(total := sum(weights)) or abs(total) < 1e-6:
        raise UserError(f"weights must not add up to {total:g}")
    experiments = [run.read_experiment(folder) for folder in folders]
    rules = [parse(each.recipes) if each.recipes else () for each in experiments]
    first = experiments[0]
    if first.base is None:
        raise UserError(f"{folders[0]} is a model by itself: it adapts no base")
    base = load(Path(first.base))
    models = [on_base(folder, base) for folder in folders]
    shares = [weight / total for weight in weights]
    if all(each and isinstance(each[-1], LowRank) and each[-1].kind in LINEAR for each in rules):
        before = [each[:-1] for each in rules]
        made, own = _sum_of_products(models, shares, base, first, _same(before, folders))
    else:
        own = _same([_plain(each, model) for each, model in zip(rules, models, strict=True)], folders)
        made = _mean(models, shares, folders)
    experiment = dataclasses.replace(first, name=out.resolve().name, recipes="+".join(map(str, own)))
    save_on_base(out, experiment, base, own, made)
    count = sum(leaf.size for leaf in jax.tree.leaves(split(made)[1]))
    said = f"{out}: the mean of {len(folders)} runs, {experiment.recipes}: {count:,} numbers beside {base.folder}"
    Console(highlight=False).print(said, markup=False, soft_wrap=True)


def save_on_base(out: Path, experiment: Experiment, base: Saved, own: Sequence[Rule], model: LanguageModel) -> None:
    """Writes a run of a model that recipes made of a base's; what is frozen only if the base does not have it."""
    run.create(out, experiment, run.read_record(base.folder)["tokenizer"], compression=(*base.recipes, *own))
    if base.own_tokenizer is not None:
        base.own_tokenizer.save(out / "tokenizer")
    _, params, frozen = split(model)
    derived = all(rule.keeps_base for rule in own)
    with Checkpoints(out, frozen=not derived) as checkpoints:
        checkpoints.save_params(params, None if derived else frozen)


def _same(rules: Sequence[tuple[Rule, ...]], folders: Sequence[Path]) -> tuple[Rule, ...]:
    for each, folder in zip(rules, folders, strict=True):
        if each != rules[0]:
            one, other = ("+".join(map(str, rule)) or "nothing" for rule in (rules[0], each))
            raise UserError(f"{folders[0]} was made with {one}, {folder} with {other}: they have no mean; merge them")
    return rules[0]


def _plain(rules: tuple[Rule, ...], model: LanguageModel) -> tuple[Rule, ...]:
    """The recipes without networks, of which the model is rid, too."""
    if not rules or not isinstance(last := rules[-1], Begin) or last.plain == last:
        return rules
    model.beginning = model.beginning.plain(model, PART)
    return (*rules[:-1], last.plain)


def _sum_of_products(
    models: Sequence[LanguageModel],
    shares: Sequence[float],
    base: Saved,
    experiment: Experiment,
    before: tuple[Rule, ...],
) -> tuple[LanguageModel, tuple[Rule, ...]]:
    """Σ share · scale · A B as one product, and the recipe that makes room for it."""
    parts: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
    for model, share in zip(models, shares, strict=True):
        for path, each in weights(model).items():
            if isinstance(each, LoRA):
                A, B = each.factors()
                parts.setdefault(dotted(path), []).append((A, share * each.scale * B))
    rank = max(sum(A.shape[-1] for A, _ in each) for each in parts.values())
    for path, ((A, B), *_) in parts.items():
        K, N = A.shape[-2], B.shape[-1]
        if rank * (K + N) >= K * N:
            raise UserError(f"{path}: the mean has the rank {rank}, and would be as large as the matrix; merge them")
    rule = LowRank(kind="lora", rank=rank, alpha=float(rank), only=exactly(sorted(parts)))
    own = (*before, rule)
    made = prepared(base.model(), dataclasses.replace(experiment, recipes="+".join(map(str, own))))
    held = {dotted(path): each for path, each in weights(made).items() if isinstance(each, LoRA)}
    for path, each in parts.items():
        A, B = (jnp.concatenate(factors, axis) for factors, axis in zip(zip(*each, strict=True), (-1, -2), strict=True))
        more = [(0, 0)] * (A.ndim - 2)
        held[path].A[...] = jnp.pad(A, [*more, (0, 0), (0, rank - A.shape[-1])])
        held[path].B[...] = jnp.pad(B, [*more, (0, rank - B.shape[-2]), (0, 0)])
    return made, own


def _mean(models: Sequence[LanguageModel], shares: Sequence[float], folders: Sequence[Path]) -> LanguageModel:
    keys = [model.subspace.key[...] for model in models if model.subspace is not None]
    for key, folder in zip(keys, folders, strict=False):
        if not jnp.array_equal(key, keys[0]):
            raise UserError(f"{folders[0]} and {folder} have other random subspaces (loop.seed): merge them")
    graphdef, _, frozen = split(models[0])
    trained = [split(model)[1] for model in models]
    mean = jax.tree.map(lambda *each: sum(s * x for s, x in zip(shares, each, strict=True)), *trained)
    return nnx.merge(graphdef, mean, frozen)
