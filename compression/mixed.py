"""Mixed precision: which matrix gets how many bits, by its name as llama.cpp does it, or as measured under a budget.

Layers are stacked, and a stack is one parameter with one format: so the choice is for a matrix of the pattern in all
its layers, never for one layer of several.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.quantize import Quantize, inputs_first, refusal, rounded
from phyla.compression.rule import Applied, Method, Rule, exactly
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel

MORE = r"(mixer\.(v|value)|channel\.(down|value)|^head|^embedding)\.weight$"
"""What llama.cpp's Q4_K_M gives more bits: values of attention, the matrices that lead out of a feed-forward layer, and
the head (here tables are often both)."""


@dataclass(frozen=True, kw_only=True)
class Q4KM(Rule):
    """q6_k for the parameters that llama.cpp's Q4_K_M gives more bits, q4_k for the others.

    There, half of the layers have six bits for values and the matrices that lead out: the first eighth, the last, and
    every third between. Here all layers have, so a model is larger than with llama.cpp.
    """

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "q4_k_m"

    def resolve(self, model: LanguageModel, moments: Moments) -> tuple[Rule, ...]:
        """See `Rule.resolve`."""
        more = f"^(?=.*(?:{self.only}))(?=.*(?:{MORE}))" if self.only else MORE
        return Quantize(format="q6_k", only=more), Quantize(format="q4_k", only=self.only)

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        return Quantize(format="q4_k").apply(model, chosen, moments, key)


CANDIDATES = (
    Quantize(format="int2", group=32, mse=True, gptq=True),
    Quantize(format="int3", group=64, mse=True, gptq=True),
    Quantize(format="int4", group=64, mse=True, gptq=True),
    Quantize(format="int8"),
)
"""In the order of their bits: 3, 3.5, 4.5 and 8, scales included. Their errors are those of rounding to nearest, which
GPTQ makes less of in all of them, and takes much longer to find."""


class Choice(NamedTuple):
    """What a candidate is for a parameter."""

    nbytes: int
    error: float
    """Of what the matrix gives, in squares, the share that is error; of a stack, of all layers together."""


@dataclass(frozen=True, kw_only=True)
class Budget(Rule):
    """At most so many bits a weight, given out greedily: next where a byte more takes away most error.

    The error of a matrix is tr(ΔWᵀ H ΔW) / tr(Wᵀ H W), with H the moments of its inputs; of heads and tables, whose
    inputs are not recorded, and of what the text never used, H = 1. What counts is the sum over layers and matrices.
    """

    bits: float

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"budget-{self.bits:g}"

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return True

    def resolve(self, model: LanguageModel, moments: Moments) -> tuple[Rule, ...]:
        """See `Rule.resolve`."""
        chosen = self._open([place for place in matrices.places(model) if self.chooses(place)])
        limit = self._limit(chosen)
        found = spend({place.name: choices(place, moments) for place in chosen}, limit)
        names: dict[Quantize, list[str]] = {}
        for name, level in found.items():
            names.setdefault(CANDIDATES[level], []).append(name)
        order = sorted(names, key=lambda recipe: len(names[recipe]))
        rules = [dataclasses.replace(recipe, only=exactly(names[recipe])) for recipe in order[:-1]]
        return *rules, *(dataclasses.replace(recipe, only=self.only) for recipe in order[-1:])

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """With the fewest bits, which is what is known beforehand. Raises UserError if they are too many."""
        self._limit(self._open(chosen))
        return CANDIDATES[0].apply(model, chosen, moments, key)

    def _open(self, chosen: list[matrices.Place]) -> list[matrices.Place]:
        return [place for place in chosen if not refusal(place, CANDIDATES[0])]

    def _limit(self, chosen: list[matrices.Place]) -> float:
        """In bytes."""
        weights = sum(place.value.size for place in chosen)
        least = 8 * sum(_nbytes(place, CANDIDATES[0]) for place in chosen) / max(1, weights)
        if self.bits < least:
            nearest = f"budget-{-(-least * 10 // 1) / 10:g}"
            raise UserError(f"{self.method}: no less than {least:.3g} bits a weight are possible; nearest: {nearest}")
        return self.bits * weights / 8


def choices(place: matrices.Place, moments: Moments) -> list[Choice]:
    """Of every candidate, measured."""
    w, *_ = inputs_first(place)
    moment = moments[place.path] if place.kind == "matrix" else None
    return [Choice(_nbytes(place, each), float(_error(w, moment, each))) for each in CANDIDATES]


def spend(choices: dict[str, list[Choice]], limit: float) -> dict[str, int]:
    """The number of the candidate of each parameter: from one for all, by the best step that still fits, and so on.

    A step is from one candidate to any later one; the best takes away most error a byte. Of all beginnings that fit,
    the one that ends with the least error: so that it is never worse than one candidate for all.
    """
    levels = range(min(map(len, choices.values()), default=0))
    fit = [level for level in levels if sum(of_name[level].nbytes for of_name in choices.values()) <= limit]
    ends = [_upgraded(choices, dict.fromkeys(choices, level), limit) for level in fit]
    return min(ends, key=lambda end: sum(choices[name][level].error for name, level in end.items()), default={})


def _upgraded(choices: dict[str, list[Choice]], chosen: dict[str, int], limit: float) -> dict[str, int]:
    while True:
        spent = sum(choices[name][level].nbytes for name, level in chosen.items())
        steps = []
        for name, level in chosen.items():
            now = choices[name][level]
            for later, then in enumerate(choices[name]):
                more, less = then.nbytes - now.nbytes, now.error - then.error
                if later > level and less > 0 and spent + more <= limit:
                    steps.append((less / max(more, 1), name, later))
        if not steps:
            return chosen
        _, name, level = max(steps)
        chosen = chosen | {name: level}


def _nbytes(place: matrices.Place, recipe: Quantize) -> int:
    return jax.eval_shape(lambda: rounded(inputs_first(place)[0], recipe, None)).nbytes


@jax.jit(static_argnums=2)
def _error(w: jax.Array, moment: jax.Array | None, recipe: Quantize) -> jax.Array:
    def one(w: jax.Array, moment: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        error = rounded(w, recipe, None).materialize() - w
        if moment is None:
            return jnp.sum(jnp.square(error)), jnp.sum(jnp.square(w))
        H = jnp.where(jnp.trace(moment) > 0, moment, jnp.eye(len(w)))
        return jnp.sum(error * (H @ error)), jnp.sum(w * (H @ w))

    sums = each(one, w) if moment is None else each(one, w, moment)
    errors, whole = (a.reshape(len(a) if a.ndim else 1, -1).sum(1) for a in sums)  # of a layer's experts together
    return jnp.sum(errors / jnp.maximum(whole, 1e-30))


METHODS = {
    "q4_k_m": Method(
        "q4_k_m",
        lambda _, only: Q4KM(only=only),
        "q6_k for what llama.cpp's Q4_K_M gives more bits (in all layers), q4_k for the rest",
    ),
    "budget-4.5": Method(
        r"budget-(\d+(?:\.\d+)?)",
        lambda found, only: Budget(bits=float(found[1]), only=only),
        "2, 3, 4 or 8 bits by matrix, at most 4.5 (or any other) on average, where they help most (reads text)",
    ),
}
"""See `phyla.compression.recipes`."""
