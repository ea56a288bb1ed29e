"""Activations of 8 bits beside weights of 8 bits, and what saves the few that are far larger than the rest.

Heads and tables of the vocabulary, whose products are the answers, keep their activations as they are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import OUTLIER, Moments, each
from phyla.compression.quantize import Quantize, quantize, refusal, round_to_nearest
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import Format, quantize_int8, quantize_llm_int8
from phyla.kernels.quantized_matmul.formats import nonzero
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import Weight
from phyla.models.wrapped import Rounded, Scaled

Per = Literal["token", "tensor"]
"""What shares a scale of activations: a token, as it comes; or all, from the largest in a text."""


BY_CHANNEL = Quantize(format="int8")
"""How weights are rounded."""


class OfColumns(Rule):
    """What needs no second moments."""

    @property
    def needs_moments(self) -> bool:
        """See `Rule.needs_moments`."""
        return False


@dataclass(frozen=True, kw_only=True)
class W8A8(OfColumns):
    """Rounds weights, with a scale for each output channel, and what they multiply."""

    per: Per = "token"

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "w8a8" + "-tensor" * (self.per == "tensor")

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.per == "tensor"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        able, left = rounded_alone(model, chosen, BY_CHANNEL)
        for place in able:
            largest = moments.columns[place.path].largest if self.per == "tensor" else None
            matrices.replace(model, place.path, _of_8_bits(place.value[...], place.axes, largest))
        return Applied(model, left)


@dataclass(frozen=True, kw_only=True)
class LlmInt8(OfColumns):
    """W8A8 by token but for inputs that reach `OUTLIER` in a text, which multiply the original weights exactly.

    Dettmers et al. 2022 (arXiv 2208.07339), who find these inputs in each batch. Here they are found beforehand, so
    that their weights alone are kept; and there is room for a fixed number, so that the names of a run's recipes give
    the shapes of its arrays. If there are more, those with the largest activations have it; room that is left stays
    empty.
    """

    columns: int | None = None
    """Room for so many inputs; None: for a 32nd of them, which costs a bit for each weight."""

    def __post_init__(self):
        super().__post_init__()
        if self.columns is not None and self.columns < 1:
            raise UserError(f"{self.method}: there must be room for an input; nearest: llm-int8-1")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "llm-int8" + (f"-{self.columns}" if self.columns is not None else "")

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return True

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        able, left = rounded_alone(model, chosen, BY_CHANNEL)
        for place in able:
            K = place.value.shape[-2]
            room = min(K, math.ceil(K / 32) if self.columns is None else self.columns)
            largest, columns = jax.lax.top_k(moments.columns[place.path].largest, room)
            columns = jnp.where(largest >= OUTLIER, columns, K)
            held = _with_outliers(place.value[...], columns)
            matrices.replace(model, place.path, Quantized(held, place.axes))
        return Applied(model, left)


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(OfColumns):
    """W8A8 with each input divided by s = max|x|^α / max|w|^(1-α), and its weights multiplied by it.

    Xiao et al. 2022 (arXiv 2211.10438, equation 4). They put 1 / s into the norm before, so that it costs nothing; here
    it multiplies the inputs (`Scaled`): then each matrix has its own, and a matrix after a gate, a recurrence, a token
    shift or a router, of which there is no norm to change, has one too.

    With one scale for all (`per` tensor) only matrices whose inputs are the residual stream's, from a norm, are
    smoothed, as by the authors: elsewhere it does harm (MiniLM, cosine to the original: none .981, these .986, all
    .929; by token, where all are: .9969 and .9989).
    """

    alpha: float
    per: Per = "token"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"{self.method}: from 0 (all in the activations) to 1; nearest: smoothquant-0.5")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"smoothquant-{self.alpha:g}" + "-tensor" * (self.per == "tensor")

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return True

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        able, left = rounded_alone(model, chosen, BY_CHANNEL)
        for place in able:
            w, largest = place.value[...], moments.columns[place.path].largest
            if self.per == "tensor" and place.axes[-2] != "embed":
                matrices.replace(model, place.path, _of_8_bits(w, place.axes, largest))
                continue
            s = smoothing(w, largest, self.alpha)
            body = _of_8_bits(w * s[..., None], place.axes, largest / s if self.per == "tensor" else None)
            matrices.replace(model, place.path, Scaled(body, 1 / s, place.axes[:-1]))
        return Applied(model, left)


METHODS = {
    "w8a8": Method(
        "w8a8",
        lambda _, only: W8A8(only=only),
        "int8, and what it multiplies is rounded to 8 bits too, a scale for each token",
    ),
    "w8a8-tensor": Method(
        "w8a8-tensor",
        lambda _, only: W8A8(per="tensor", only=only),
        "the same with one scale for all that a matrix multiplies, the largest seen (reads text)",
    ),
    "llm-int8": Method(
        r"llm-int8(?:-(\d+))?",
        lambda found, only: LlmInt8(columns=found[1] and int(found[1]), only=only),
        "w8a8, but inputs that reach 6 multiply exact weights: a 32nd, or llm-int8-16 (reads text)",
    ),
    "smoothquant-0.5": Method(
        r"smoothquant-(\d+(?:\.\d+)?)",
        lambda found, only: SmoothQuant(alpha=float(found[1]), only=only),
        "w8a8 after large inputs are made smaller and their weights larger by 0.5 of it (reads text)",
    ),
    "smoothquant-0.5-tensor": Method(
        r"smoothquant-(\d+(?:\.\d+)?)-tensor",
        lambda found, only: SmoothQuant(alpha=float(found[1]), per="tensor", only=only),
        "the same before w8a8-tensor (reads text)",
    ),
}
"""See `phyla.compression.recipes`."""


def rounded_alone(
    model: LanguageModel, chosen: list[matrices.Place], rounding: Quantize
) -> tuple[list[matrices.Place], dict[str, str]]:
    """The matrices whose activations count; the others are rounded to nearest, or left for the reason that is given."""
    able = [place for place in chosen if place.kind == "matrix" and not refusal(place, rounding)]
    return able, quantize(model, [place for place in chosen if place not in able], rounding, Moments())


def smoothing(w: jax.Array, largest: jax.Array, alpha: float) -> jax.Array:
    """s [..., K] for w [..., K, N] and the largest inputs [..., K]; an input never seen, or without weights, has 1."""
    most = jnp.max(jnp.abs(w), axis=-1)
    s = jnp.maximum(largest, 1e-5) ** alpha / jnp.maximum(most, 1e-5) ** (1 - alpha)
    return jnp.where((largest > 0) & (most > 0), s, 1.0)


@jax.jit
def _with_outliers(w: jax.Array, columns: jax.Array) -> Format:
    return each(quantize_llm_int8, w, columns)


@jax.jit
def _dynamic(w: jax.Array) -> Format:
    return each(lambda w: quantize_int8(w, dynamic=True), w)


def _of_8_bits(w: jax.Array, axes: tuple[str, ...], largest: jax.Array | None) -> Weight:
    """With activations rounded by token, or, if the largest of each input [..., K] is given, by one scale."""
    if largest is None:
        return Quantized(_dynamic(w), axes)
    most = jnp.max(largest, axis=-1)
    most = jnp.where(most > 0, most, jnp.max(most))  # an expert that no token of the text used
    return Rounded(Quantized(round_to_nearest(w, BY_CHANNEL), axes), nonzero(most / 127), axes[:-2])
