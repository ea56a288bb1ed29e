"""A compressed model is the same model with other weights."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from phyla.compression import matrices
from phyla.compression.adapters import PART
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Rule
from phyla.models import sizes
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel

Measure = Callable[[LanguageModel, Iterable[tuple[jax.Array, jax.Array]]], Moments]
"""`Rule.measure`."""


class Step(NamedTuple):
    """What one recipe did to a model."""

    model: LanguageModel
    recipe: Rule
    rules: tuple[Rule, ...]
    """What it was for this model: see `Rule.resolve`."""
    changed: tuple[str, ...]
    """Paths of parameters."""
    left: dict[str, str]
    """Paths of the dense parameters that it left as they were, and why."""
    note: str = ""
    """What else is to be said of it."""


def no_text(model: LanguageModel, measure: Measure) -> Moments:
    """Zeros."""
    return measure(model, ())


def compress(
    model: LanguageModel,
    recipes: Sequence[Rule],
    calibrate: Callable[[LanguageModel, Measure], Moments] = no_text,
    seed: int = 0,
) -> list[Step]:
    """Applies recipes in their order, each to what the one before made; the model that is given stays as it is.

    Args:
        model: the model.
        recipes: what to do.
        calibrate: reads a text with a model and with what a recipe `measure`s, for recipes that need it; by default no
            text, after which GPTQ rounds to nearest, SparseGPT prunes by magnitude and activations have the scale 1.
        seed: of what recipes draw at random.

    Raises UserError if a recipe finds nothing that it could change.
    """
    steps = []
    for recipe, key in zip(recipes, jax.random.split(jax.random.key(seed), len(recipes)), strict=True):
        before = steps[-1].model if steps else model
        moments = calibrate(before, recipe.measure) if recipe.needs_text else Moments()
        steps.append(_apply(before, recipe, recipe.resolve(before, moments), moments, key))
    return steps


def abstract(config: ModelConfig, recipes: Sequence[Rule]) -> LanguageModel:
    """The compressed model with shapes in place of arrays; nothing is computed. Raises UserError as `compress`.

    What recipes make whose names alone do not say the shapes of it is as small as it could be.
    """
    if not recipes:
        return sizes.abstract(config)

    def made() -> LanguageModel:
        model = LanguageModel(config, nnx.Rngs(0))
        for recipe in recipes:
            moments = no_text(model, recipe.measure) if recipe.needs_text else Moments()
            model = _apply(model, recipe, (recipe,), moments, jax.random.key(0)).model
        return model

    return jax.eval_shape(made)


def shaping(recipes: Sequence[Rule]) -> tuple[Rule, ...]:
    """Those that say in what form a compressed run's parameters are, given the configuration of its model.

    They are all after the last that made a model of another configuration, which is an ordinary one.
    """
    last = max((i for i, recipe in enumerate(recipes) if recipe.reshapes), default=-1)
    return tuple(recipes[last + 1 :])


def _apply(model: LanguageModel, recipe: Rule, rules: Sequence[Rule], moments: Any, key: jax.Array) -> Step:
    if recipe.reshapes and model.subspace is not None:
        raise UserError(f"{recipe}: this model moves in a subspace of its parameters: merge it first")
    model = nnx.clone(model)
    everything = matrices.places(model)
    left = {place.name: place.left for place in everything if not place.kind and not recipe.reshapes}
    others = [place for place in everything if place.kind and not any(rule.chooses(place) for rule in rules)]
    left |= {place.name: f"{recipe} is not for it" for place in others}
    done, besides, notes = [], (), []
    for rule in rules:  # each for what those before it left
        chosen = [place for place in matrices.places(model) if rule.chooses(place)]
        model, of_chosen, more, note = rule.apply(model, chosen, moments, key)
        left = {name: why for name, why in left.items() if name not in {place.name for place in chosen}} | of_chosen
        besides += more
        notes += [note] * bool(note)
        if more or of_chosen.keys() < {place.name for place in chosen}:
            done.append(rule)
    changed = (*(place.name for place in everything if place.name not in left), *besides)
    left = {name: why for name, why in left.items() if name not in besides}
    if not changed:
        raise UserError(f"{recipe} changes nothing in this model: {_reason(recipe, everything, left)}")
    return Step(model, recipe, tuple(done), changed, left, "; ".join(notes))


def _reason(recipe: Rule, everything: list[matrices.Place], left: dict[str, str]) -> str:
    if not any(place.kind for place in everything):
        if kept := [place.name for place in everything if place.path[-1] == "body" or place.left == PART]:
            return f"{kept[0]} stays as it is ({left[kept[0]]})"
        return "every matrix is quantized already (prune before you quantize)"
    found = [place for place in everything if re.search(recipe.only, place.name)]
    if found:
        first = min(found, key=lambda place: place.kind not in ("matrix", "values"))  # all methods are for these
        return f"{first.name} stays as it is ({left[first.name]})"
    free = [place.name for place in everything if place.kind]
    nearest = difflib.get_close_matches(recipe.only, free, n=1, cutoff=0.0)[0]
    return f"'{recipe.only}' is in no dense parameter's path; nearest: {nearest}"
