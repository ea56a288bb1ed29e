"""Rotations of what matrices multiply, after which no input is far larger than the others."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.rule import Applied, Method, Rule
from phyla.models.language_model import LanguageModel
from phyla.models.wrapped import Rotated, odd_factors


@dataclass(frozen=True, kw_only=True)
class Rotate(Rule):
    """Each matrix W becomes Qᵀ W, and multiplies x Q: see `Rotated`. Made to be chained with what rounds."""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "rotate"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left = {}
        for place, own_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
            *stack, K, _ = place.value.shape
            if place.kind != "matrix":
                left[place.name] = "heads and tables of the vocabulary are not rotated"
            elif (largest := max(odd_factors(K), default=1)) > Rotated.MOST_ODD:
                left[place.name] = f"of {K} inputs, whose odd factor {largest} is more than {Rotated.MOST_ODD}"
            else:
                signs = jax.random.rademacher(own_key, (*stack, K), jnp.int8)
                body = place.value.replace(_turned(place.value[...], signs))
                assert isinstance(body, nnx.Param)
                matrices.replace(model, place.path, Rotated(body, signs, place.axes[:-1]))
        return Applied(model, left)


METHODS = {
    "rotate": Method(
        "rotate",
        lambda _, only: Rotate(only=only),
        "large inputs are spread over all by a Hadamard matrix: before w8a8, w8a8-tensor, int4, gptq-int4",
    ),
}
"""See `phyla.compression.recipes`."""


@jax.jit
def _turned(w: jax.Array, signs: jax.Array) -> jax.Array:
    return each(Rotated.turned, w, signs)
