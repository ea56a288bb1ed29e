"""Recipes that freeze a model and train d numbers, which move all of it within a random subspace."""

import difflib
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
from flax import nnx

from phyla.compression import matrices
from phyla.compression.adapters import PART
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.subspace import Subspace
from phyla.models.weights import freeze, trainable


@dataclass(frozen=True, kw_only=True)
class Intrinsic(Rule):
    """Moves every parameter that was trained before, or those of them that `only` finds; see `Subspace`."""

    keeps_base: ClassVar[bool] = True
    dimension: int
    """d."""
    projection: Literal["dense", "fastfood"] = "dense"

    def __post_init__(self):
        super().__post_init__()
        if self.dimension < 1:
            raise UserError(f"{self.method}: there must be a direction; nearest: intrinsic-1")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"intrinsic-{self.dimension}" + "-fastfood" * (self.projection == "fastfood")

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError if it finds nothing, or fewer numbers than directions."""
        if model.subspace is not None:
            raise UserError(f"{self}: this model moves in a subspace already: merge it first")
        able = {matrices.dotted(path): (path, each) for path, each in nnx.to_flat_state(nnx.state(model, trainable))}
        found = {name: each for name, each in able.items() if re.search(self.only, name)}
        if not found:
            nearest = difflib.get_close_matches(self.only, able, n=1, cutoff=0.0)
            raise UserError(f"{self}: '{self.only}' is in no path of a parameter; nearest: {', '.join(nearest)}")
        size = sum(each.size for _, each in found.values())
        if self.dimension > size:
            raise UserError(f"{self}: these parameters have {size:,} numbers; nearest: intrinsic-{size}")
        freeze(model)
        paths = tuple(path for path, _ in found.values())
        for _, each in found.values():
            each.set_metadata(precise=PART)
        model.subspace = Subspace(paths, size, self.dimension, self.projection, key, PART)
        left = {place.name: "frozen" for place in chosen if place.name not in found}
        return Applied(model, left, tuple(found))


def _make(found: re.Match, only: str) -> Rule:
    return Intrinsic(dimension=int(found[1]), projection="fastfood" if found[2] else "dense", only=only)


METHODS = {
    "intrinsic-200": Method(
        r"intrinsic-(\d+)(-fastfood)?",
        _make,
        "trains 200 numbers that move all parameters in a random subspace; -fastfood: by Hadamard matrices",
    ),
}
"""See `phyla.compression.recipes`."""
