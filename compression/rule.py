"""What every recipe is: something that is done to a model, as frozen data that knows its name and how it is done.

A kind of recipe is a subclass of `Rule` in a file of its own, beside what it does; its names are listed in
`phyla.compression.recipes`.
"""

import abc
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax

from phyla.compression import calibrate, matrices
from phyla.compression.calibrate import Moments
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Rule(abc.ABC):
    """What every recipe is."""

    only: str = ""
    """A regular expression, found somewhere in the paths of the parameters that it is for; empty: all."""

    reshapes: ClassVar[bool] = False
    """Whether it makes an ordinary model of another configuration: `apply` returns it with its own `config`."""
    keeps_base: ClassVar[bool] = False
    """Whether every array of the model before is in the model after, so that only what is new need be saved."""

    def __post_init__(self):
        try:
            re.compile(self.only)
        except re.error as error:
            raise UserError(f"{self.method}@{self.only}: not a regular expression: {error}") from error

    @property
    @abc.abstractmethod
    def method(self) -> str:
        """Its name without `only`."""

    @property
    def needs_text(self) -> bool:
        """Whether it depends on what the matrices multiply, so that a text must be read."""
        return False

    @property
    def needs_moments(self) -> bool:
        """Whether it depends on second moments, not on each input's own figures alone (`calibrate.Columns`)."""
        return self.needs_text

    def resolve(self, model: LanguageModel, moments: Moments) -> tuple["Rule", ...]:
        """What it is for this model, as recipes by whose names alone the shapes of what they make are known.

        A run is recorded as these. Raises UserError if there is nothing in the model that it is for.
        """
        return (self,)

    def measure(self, model: LanguageModel, batches: Iterable[tuple[jax.Array, jax.Array]]) -> Moments:
        """What it wants to know of a text, if it `needs_text`; zeros of no text. See `calibrate.moments`."""
        return calibrate.moments(model, batches, self.needs_moments)

    @abc.abstractmethod
    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> "Applied":
        """Does it.

        Args:
            model: may be changed in place.
            chosen: its parameters that `only` chooses, of those that any method may touch; of all if it `reshapes`.
            moments: what it `measure`s of a text in this model, if it `needs_text`.
            key: for what it draws at random.
        """

    def chooses(self, place: matrices.Place) -> bool:
        """Whether it is for this parameter, which any method may touch (or which is cut with others)."""
        return (place.kind is not None or self.reshapes) and re.search(self.only, place.name) is not None

    def __str__(self) -> str:
        return f"{self.method}@{self.only}" if self.only else self.method


def exactly(names: Iterable[str]) -> str:
    """`Rule.only` that chooses the parameters of these names alone."""
    return f"^({'|'.join(map(re.escape, names))})$"


class Applied(NamedTuple):
    """What `Rule.apply` made."""

    model: LanguageModel
    left: dict[str, str]
    """Paths of the chosen parameters that it left as they were, and why; of all if it reshapes."""
    changed: tuple[str, ...] = ()
    """Paths of what it changed besides: `Weight`s, parameters that are not among the chosen."""
    note: str = ""
    """What else is to be said of it."""


class Method(NamedTuple):
    """How a kind of recipe is named."""

    pattern: str
    """A regular expression that all its names match, and no other."""
    make: Callable[[re.Match, str], Rule]
    """From the match and `Rule.only`."""
    summary: str
