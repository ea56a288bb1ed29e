"""Matrices with N nonzero of every M inputs are held without the zeros.

Zeros without such an order are held like other values: where they are would have no shape that is known beforehand.
They cost little on disk (`entropy`).
"""

import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.rule import Applied, Method, Rule, exactly
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.packed import Packed, pack_groups, packed_bits, place_bits

LEFT = "heads and tables of the vocabulary are not pruned, hence not packed"
LARGEST = 256
"""Inputs of a group: their numbers are in bytes."""


@dataclass(frozen=True, kw_only=True)
class Pack(Rule):
    """Keeps the nonzero weights, and where they are, of the matrices that have at most `keep` in every `group`."""

    keep: int
    group: int

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.keep < self.group <= LARGEST:
            group = min(max(2, self.group), LARGEST)
            nearest = f"pack-{min(max(1, self.keep), group - 1)}:{group}"
            raise UserError(f"{self.method}: at least 1 of at most {LARGEST}, and not all; nearest: {nearest}")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"pack-{self.keep}:{self.group}"

    def resolve(self, model: LanguageModel, moments: Moments) -> tuple[Rule, ...]:
        """See `Rule.resolve`: for those that have so many zeros."""
        chosen = [place for place in matrices.places(model) if self.chooses(place) and place.kind == "matrix"]
        most = {place.name: int(most_nonzero(place.value[...], self.group)) for place in chosen}
        fit = [name for name, count in most.items() if count <= self.keep]
        if len(fit) == len(chosen):
            return (self,)
        if not fit:
            name, count = next(iter(most.items()))
            raise UserError(
                f"{self} changes nothing in this model: {name} has up to {count} of {self.group} that are not zero; "
                f"nearest: magnitude-{self.keep}:{self.group}+{self}"
            )
        return (Pack(keep=self.keep, group=self.group, only=exactly(fit)),)

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left = {}
        for place in chosen:
            K = place.value.shape[-2]
            if place.kind == "values":
                left[place.name] = "packed already"
            elif place.kind != "matrix":
                left[place.name] = LEFT
            elif packed_bits(K, self.keep, self.group) >= 32 * K:
                bits = place_bits(self.group)
                left[place.name] = f"of {K} inputs: {self.keep} of {self.group} and {bits} bits for each are not less"
            else:
                one = functools.partial(pack_groups, keep=self.keep, group=self.group)
                values, places = jax.jit(functools.partial(each, one))(place.value[...])
                *stack, _, columns = place.axes
                kept = matrices.part(place.value, values, (*stack, columns, "kept"))
                held = Packed(kept, places, place.axes, K, self.keep, self.group)
                matrices.replace(model, place.path, held)
        return Applied(model, left)


def _make(found: re.Match, only: str) -> Pack:
    return Pack(keep=int(found[1]), group=int(found[2]), only=only)


METHODS = {
    "pack-2:4": Method(
        r"pack-(\d+):(\d+)", _make, "what has at most 2 of 4 inputs of an output nonzero is held without the zeros"
    )
}
"""See `phyla.compression.recipes`."""


@jax.jit(static_argnums=1)
def most_nonzero(w: jax.Array, group: int) -> jax.Array:
    """In any group of consecutive inputs of an output of w [..., K, N]."""
    *stack, K, N = w.shape
    padding = [(0, 0)] * len(stack) + [(0, -K % group), (0, 0)]
    return jnp.count_nonzero(jnp.pad(w, padding).reshape(*stack, -1, group, N), axis=-2).max()
