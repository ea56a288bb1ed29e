"""KV caches and recurrent states in 8 bits: not what a model has learned becomes smaller, but what it remembers.

What of a layer's state 8 bits do for, and what shares a scale, the layer says (`phyla.models.layers.Layer.memory`). A
forward pass over a whole text keeps no state and loses nothing: what it costs shows where a state is carried
(`phyla.training.carried`).
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from phyla.compression import matrices
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.layers import Layer


@dataclass(frozen=True, kw_only=True)
class HoldState(Rule):
    """Codes of 8 bits between calls, floats inside a call (`phyla.models.held`); `only` chooses parts of the state."""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "state-int8"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError if the model keeps no state, or none that is still floats."""
        if model.config.bidirectional:
            raise UserError(f"{self}: a model that sees both sides keeps no state; make its weights smaller")
        able = {f"{path}.{part}": (mixer, part) for path, mixer in mixers(model) for part in mixer.memory}
        found = {name: each for name, each in able.items() if re.search(self.only, name)}
        if not found:
            nearest = difflib.get_close_matches(self.only, able, n=1, cutoff=0.0)[0]
            raise UserError(f"{self}: '{self.only}' is in no path of a state; nearest: {nearest}")
        new = {name: (mixer, part) for name, (mixer, part) in found.items() if part not in mixer.held}
        if not new:
            raise UserError(f"{self} changes nothing in this model: {min(found)} has 8 bits already")
        for mixer, part in new.values():
            mixer.held = (*mixer.held, part)
        left = {place.name: "a weight, and no state" for place in chosen}
        return Applied(model, left, tuple(new), f"8 bits between calls: {', '.join(new)}")


METHODS = {
    "state-int8": Method(
        "state-int8",
        lambda _, only: HoldState(only=only),
        "KV caches and recurrent states have 8 bits between calls (of one part: state-int8@mixer.k)",
    ),
}
"""See `phyla.compression.recipes`."""


def mixers(model: LanguageModel) -> Iterator[tuple[str, Layer]]:
    """The sequence mixers by their paths; one stands for all repeats of its block."""
    for path, blocks in (("prefix", model.prefix), ("periods.blocks", model.periods.blocks)):
        yield from ((f"{path}.{i}.mixer", block.mixer) for i, block in enumerate(blocks))


def is_held(model: LanguageModel) -> bool:
    """Whether any of its state has 8 bits between calls."""
    return any(mixer.held for _, mixer in mixers(model))
