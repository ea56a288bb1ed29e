"""Every recipe by the name that the command line knows it by: the one list to extend.

A name is a method with its options (`int4-g64`, `magnitude-2:4`), and `@REGEX` if it is for some matrices only
(`int8@embedding`); names are chained with `+` and applied in that order. `str(recipe)` is the name again, so that a run
directory needs no more than the names.
"""

import re

from phyla.compression import (
    activations,
    adapters,
    awq,
    cluster,
    depth,
    entropy,
    factorise,
    few,
    intrinsic,
    merge,
    mixed,
    pack,
    prune,
    qat,
    quantize,
    rotate,
    state,
    structure,
)
from phyla.compression.rule import Rule
from phyla.models.errors import choose

MODULES = (
    quantize,
    qat,
    mixed,
    awq,
    activations,
    rotate,
    cluster,
    prune,
    pack,
    structure,
    depth,
    factorise,
    entropy,
    state,
    adapters,
    few,
    intrinsic,
    merge,
)
METHODS = {name: method for module in MODULES for name, method in module.METHODS.items()}
"""By an example of their names."""

EXPLAINED = """
Chain them with +, in their order: magnitude-50%+int8. METHOD@REGEX is for the parameters alone in whose paths the
regular expression (without +) is found: int8@embedding+nf4 rounds the embedding to 8 bits and the rest to 4.
"""


def parse(text: str) -> tuple[Rule, ...]:
    """The recipes of names chained with `+`. Raises UserError with the nearest name, or the option that is wrong."""
    return tuple(_named(name) for name in text.split("+"))


def explained() -> str:
    """Every method in a line, and how they are combined."""
    widest = max(map(len, METHODS))
    return "".join(f"{name:<{widest}}  {method.summary}\n" for name, method in METHODS.items()) + EXPLAINED


def _named(name: str) -> Rule:
    asked, _, only = name.partition("@")
    for method in METHODS.values():
        if found := re.fullmatch(method.pattern, asked):
            return method.make(found, only)
    choose("method", asked, METHODS)
    raise AssertionError(f"{asked} is an example that its own pattern does not match")
