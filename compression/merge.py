"""Merging adapters with what they wrap."""

import re
from dataclasses import dataclass

import jax
from flax import nnx

from phyla.compression import matrices
from phyla.compression.adapters import PART, of_each
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models import sizes
from phyla.models.adapted import Adapter
from phyla.models.beginnings import EncodedPrompt, EncodedState
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import Weight, parameter, unfreeze


@dataclass(frozen=True, kw_only=True)
class Merge(Rule):
    """Every adapter becomes one dense matrix with what it wraps, a subspace the parameters that it moved.

    A beginning that is trained through a network becomes what the network makes. Nothing is frozen any more.
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
            _restore(model, dense)
        held = {path: each for path, each in matrices.weights(model).items() if isinstance(each, Adapter)}
        found = {path: each for path, each in held.items() if re.search(self.only, matrices.dotted(path))}
        encoded = isinstance(model.beginning, EncodedPrompt | EncodedState)
        if not found and not moved and not encoded:
            raise UserError(f"{self}: there is no adapter in this model" + (" at such a path" if held else ""))
        if encoded:
            model.beginning = model.beginning.plain(model, PART)
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
        made = [("beginning", *path) for path, _ in nnx.to_flat_state(nnx.state(model.beginning, nnx.Param)) if encoded]
        return Applied(model, left, tuple(map(matrices.dotted, [*found, *moved, *made])), note)


def bare(model: LanguageModel) -> LanguageModel:
    """The base alone, with the very arrays that it has in the model: without adapters, subspace and learned beginning.

    What BitFit trained is of the base itself, and stays.
    """
    model = nnx.clone(model)
    for path, each in matrices.weights(model).items():
        while isinstance(each, Adapter):
            each = each.body
            matrices.replace(model, path, each)
    for added in ("subspace", "beginning"):
        if getattr(model, added) is not None:
            delattr(model, added)
    _restore(model, {place.path: place for place in matrices.places(sizes.abstract(model.config))})
    unfreeze(model)
    return model


def _restore(model: LanguageModel, dense: dict[tuple, matrices.Place]) -> None:
    """What a parameter that no adapter is on any more says of itself."""
    for path, each in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path in dense:
            each.set_metadata(precise=dense[path].value.get_metadata()["precise"])


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
