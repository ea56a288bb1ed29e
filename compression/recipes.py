"""What can be done to a model, as frozen data, and the names by which the command line knows it.

A name is a method with its options (`int4-g64`, `magnitude-2:4`), and `@REGEX` if it is for some matrices only
(`int8@embedding`); names are chained with `+` and applied in that order. `str(recipe)` is the name again, so that a run
directory needs no more than the names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from phyla.models.errors import UserError, choose


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every recipe is: something that is done to matrices."""

    only: str = ""
    """A regular expression, found somewhere in the paths of the parameters that it is for; empty: all."""

    def __post_init__(self):
        try:
            re.compile(self.only)
        except re.error as error:
            raise UserError(f"{self.method}@{self.only}: not a regular expression: {error}") from error

    @property
    def method(self) -> str:
        """Its name without `only`."""
        raise NotImplementedError

    @property
    def needs_text(self) -> bool:
        """Whether it depends on what the matrices multiply, so that a text must be read."""
        return False

    def __str__(self) -> str:
        return f"{self.method}@{self.only}" if self.only else self.method


@dataclass(frozen=True, kw_only=True)
class Quantize(Rule):
    """Rounds every matrix and every table of the vocabulary."""

    format: Literal["int8", "int4", "nf4", "float8"]
    group: int | None = None
    """Inputs that share a scale, for int4; None: all of an output channel. NF4's are 64."""
    gptq: bool = False
    """Not to nearest: what rounding one input costs is made good by the others. Heads and tables to nearest still."""

    def __post_init__(self):
        super().__post_init__()
        if self.gptq and self.format not in ("int8", "int4"):
            raise UserError(f"{self.method}: GPTQ is for int8 and int4; nearest: gptq-int4")
        if self.group is not None and self.format != "int4":
            raise UserError(f"{self.method}: only int4 has groups to choose; nearest: {self.format}")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise UserError(f"{self.method}: a group is an even number; nearest: int4-g{max(2, self.group + 1)}")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "gptq-" * self.gptq + self.format + (f"-g{self.group}" if self.group is not None else "")

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.gptq


Measure = Literal["magnitude", "wanda", "sparsegpt"]
"""By what weights are chosen to go: |w|; |w| · ‖x‖ among those of an output (Sun et al. 2023, arXiv 2306.11695); or
what their loss costs after the others have made it good (`feedback`)."""


@dataclass(frozen=True, kw_only=True)
class Prune(Rule):
    """Sets weights to zero."""

    by: Measure = "magnitude"

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.by != "magnitude"


@dataclass(frozen=True, kw_only=True)
class PruneSmallest(Prune):
    """Sets a share of the weights to zero: the least of each matrix, or of all matrices together."""

    percent: float
    together: bool = False
    """Of all matrices together: then some lose more than others."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.percent < 100:
            raise UserError(f"{self.method}: more than 0 and less than 100 % can go; nearest: {self.by}-50%")
        if self.together and self.by != "magnitude":
            raise UserError(f"{self.method}: only magnitudes compare between matrices; nearest: {self.by}-50%")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"{self.by}-{self.percent:g}%" + "-global" * self.together


@dataclass(frozen=True, kw_only=True)
class PruneGroups(Prune):
    """Keeps the `keep` largest of every `group` consecutive inputs of each output (N:M, as in 2:4)."""

    keep: int
    group: int

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.keep < self.group:
            group = max(2, self.group)
            nearest = f"{self.by}-{min(max(1, self.keep), group - 1)}:{group}"
            raise UserError(f"{self.method}: at least 1 stays, and fewer than there are; nearest: {nearest}")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"{self.by}-{self.keep}:{self.group}"


Recipe = Quantize | PruneSmallest | PruneGroups


class Method(NamedTuple):
    """How a kind of recipe is named."""

    pattern: str
    """A regular expression that all its names match, and no other."""
    make: Callable[[re.Match, str], Recipe]
    """From the match and `Rule.only`."""
    summary: str


SHARE = r"-(\d+(?:\.\d+)?)%"


def _share(by: Measure, summary: str) -> Method:
    make = lambda found, only: PruneSmallest(by=by, percent=float(found[1]), only=only)  # noqa: E731
    return Method(by + SHARE, make, summary)


def _groups(by: Measure, summary: str) -> Method:
    make = lambda found, only: PruneGroups(by=by, keep=int(found[1]), group=int(found[2]), only=only)  # noqa: E731
    return Method(by + r"-(\d+):(\d+)", make, summary)


METHODS = {
    "int8": Method(
        "int8",
        lambda _, only: Quantize(format="int8", only=only),
        "codes of 8 bits, a scale for each output channel",
    ),
    "int4": Method(
        "int4",
        lambda _, only: Quantize(format="int4", only=only),
        "codes of 4 bits, a scale for each output channel",
    ),
    "int4-g64": Method(
        r"int4-g(\d+)",
        lambda found, only: Quantize(format="int4", group=int(found[1]), only=only),
        "codes of 4 bits, a scale for each 64 (or any even number of) inputs of an output channel",
    ),
    "nf4": Method(
        "nf4",
        lambda _, only: Quantize(format="nf4", only=only),
        "16 quantiles of the normal distribution in blocks of 64, whose scales have 8 bits (QLoRA)",
    ),
    "float8": Method(
        "float8",
        lambda _, only: Quantize(format="float8", only=only),
        "floats of 8 bits (e4m3), a scale for each output channel",
    ),
    "gptq-int8": Method(
        "gptq-int8",
        lambda _, only: Quantize(format="int8", gptq=True, only=only),
        "int8, one input after another: those that follow make each one's error good (reads text)",
    ),
    "gptq-int4": Method(
        "gptq-int4",
        lambda _, only: Quantize(format="int4", gptq=True, only=only),
        "the same with int4",
    ),
    "gptq-int4-g128": Method(
        r"gptq-int4-g(\d+)",
        lambda found, only: Quantize(format="int4", group=int(found[1]), gptq=True, only=only),
        "the same with a scale for each 128 (or any even number of) inputs of an output channel",
    ),
    "magnitude-50%": _share("magnitude", "the smallest 50 % (or any other share) of each matrix become zero"),
    "magnitude-50%-global": Method(
        "magnitude" + SHARE + "-global",
        lambda found, only: PruneSmallest(percent=float(found[1]), together=True, only=only),
        "the smallest 50 % (or any other share) of all matrices together become zero",
    ),
    "magnitude-2:4": _groups("magnitude", "of every 4 inputs of an output the 2 largest stay (or any N of M)"),
    "wanda-50%": _share(
        "wanda", "as magnitude, times the size of the input, and of each output by itself (reads text)"
    ),
    "wanda-2:4": _groups(
        "wanda", "of every 4 inputs of an output the 2 largest, times the size of the input (reads text)"
    ),
    "sparsegpt-50%": _share("sparsegpt", "what costs least after the other inputs made it good (reads text)"),
    "sparsegpt-2:4": _groups("sparsegpt", "2 of every 4 inputs of an output stay, in the same way (reads text)"),
}
"""By an example of their names."""

EXPLAINED = """
Chain them with +, in their order: magnitude-50%+int8. METHOD@REGEX is for the parameters alone in whose paths the
regular expression (without +) is found: int8@embedding+nf4 rounds the embedding to 8 bits and the rest to 4.
"""


def parse(text: str) -> tuple[Recipe, ...]:
    """The recipes of names chained with `+`. Raises UserError with the nearest name, or the option that is wrong."""
    return tuple(_named(name) for name in text.split("+"))


def explained() -> str:
    """Every method in a line, and how they are combined."""
    widest = max(map(len, METHODS))
    return "".join(f"{name:<{widest}}  {method.summary}\n" for name, method in METHODS.items()) + EXPLAINED


def _named(name: str) -> Recipe:
    asked, _, only = name.partition("@")
    for method in METHODS.values():
        if found := re.fullmatch(method.pattern, asked):
            return method.make(found, only)
    choose("method", asked, METHODS)
    raise AssertionError(f"{asked} is an example that its own pattern does not match")
