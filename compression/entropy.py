"""A run is written with what has few bits in Huffman codes. The model stays as it is."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from phyla.compression import matrices
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Huffman(Rule):
    """The last of a chain; see `huffman`."""

    def __post_init__(self):
        super().__post_init__()
        if self.only:
            raise UserError(f"{self}: all codes of a run are written so, or none; nearest: huffman")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "huffman"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        coded, _ = split(nnx.state(model))
        paths = nnx.to_flat_state(coded)
        if not paths:
            raise UserError(
                "huffman: nothing in this model has few bits, and floats are not coded; nearest: int4+huffman"
            )
        holders = {path for path in matrices.weights(model) if any(path == of[: len(path)] for of, _ in paths)}
        left = {place.name: "floats are not coded" for place in chosen}
        return Applied(model, left, changed=tuple(sorted(map(matrices.dotted, holders))))


METHODS = {
    "huffman": Method(
        "huffman", lambda _, only: Huffman(only=only), "last: codes of 8 or fewer bits are Huffman-coded on disk"
    )
}
"""See `phyla.compression.recipes`."""


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """What is written in Huffman codes, arrays whose items are bytes, and what is not."""

    def coded(_: Any, variable: nnx.Variable) -> bool:
        return variable.dtype.itemsize == 1

    of_bytes, others = nnx.split_state(params, coded, ...)
    return of_bytes, others
