"""Merging adapters with what they wrap."""

import re
from dataclasses import dataclass

import jax
from flax import nnx

from phyla.compression import matrices
from phyla.compression.adapters import of_each
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models import sizes
from phyla.models.adapted import Adapter
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import Weight, parameter, unfreeze


@dataclass(frozen=True, kw_only=True)
class Merge(Rule):
    """Every adapter becomes one dense matrix with what it wraps, a subspace the parameters that it moved.

    Nothing is frozen any more.
    """

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "merge"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError if there is nothing to merge, or an adapter is no matrix."""
        dense = {place.path: place for place in matrices.places(sizes.abstract(model.config))}
        moved = () if model.subspace is None else model.subspace.paths
        if moved:
            model = nnx.jit(LanguageModel.moved)(model)
            for path, each in nnx.to_flat_state(nnx.state(model, nnx.Param)):
                if path in dense:
                    each.set_metadata(precise=dense[path].value.get_metadata()["precise"])
        held = {path: each for path, each in matrices.weights(model).items() if isinstance(each, Adapter)}
        found = {path: each for path, each in held.items() if re.search(self.only, matrices.dotted(path))}
        if not found and not moved:
            raise UserError(f"{self}: there is no adapter in this model" + (" at such a path" if held else ""))
        rounded = 0
        for path, each in found.items():
            if not is_linear(each):
                raise UserError(f"{matrices.dotted(path)} has a bottleneck, which is no matrix and cannot be merged")
            rounded += any(isinstance(part, Quantized) for _, part in nnx.iter_modules(each))
            like = dense[path].value.get_metadata()
            value = of_each(lambda w: w, each)
            kept = {name: like[name] for name in ("weight_decay", "matrix", "learning_rate", "share", "precise")}
            axes = dense[path].axes
            matrices.replace(
                model, path, parameter(lambda *_, v=value: v, value.shape, axes, nnx.Rngs(params=key), **kept)
            )
        unfreeze(model)
        left = {place.name: "no adapter is on it" for place in chosen}
        note = f"{rounded} weights of few bits were made dense to be merged; round them again for less" * (rounded > 0)
        return Applied(model, left, tuple(map(matrices.dotted, {**found, **dict.fromkeys(moved)})), note)


def is_linear(weight: nnx.Param | Weight) -> bool:
    """Whether a weight, with all that it wraps, stands for a matrix."""
    while isinstance(weight, Adapter):
        if not weight.linear:
            return False
        weight = weight.body
    return True


METHODS = {
    "merge": Method("merge", lambda _, only: Merge(only=only), "makes one dense matrix of each adapter and its base"),
}
"""See `phyla.compression.recipes`."""
