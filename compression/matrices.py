"""Which parameters a method may touch: by what they say of themselves, never by their names.

A *matrix* is a parameter with `matrix=True`, which multiplies activations from the right; a *table* has a vector for
each word of the vocabulary (the embedding, and with it a tied head). What is neither stays as it is: norms, biases,
convolutions, a Mamba's A_log, D and dt_bias, sLSTM's recurrent matrices, mixing coefficients, position and type
embeddings. So do matrices that say why (`precise`): routers, gates, Mamba's dt_proj, RWKV's low-rank decays and rates.
"""

from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from phyla.models.config import ModelConfig
from phyla.models.fake import FakeQuantized
from phyla.models.language_model import LanguageModel
from phyla.models.registry import LAYERS
from phyla.models.weights import Weight


class Place(NamedTuple):
    """A dense parameter and where it lies: in a layer, or as the `body` of a weight that wraps it."""

    path: tuple[Any, ...]
    value: nnx.Param
    axes: tuple[str, ...]
    kind: Literal["matrix", "head", "table", "values"] | None
    """`values` are the nonzero ones of a matrix, [out, kept], which multiply nothing by themselves."""
    left: str
    """Why no method may touch it, where the kind is None."""

    @property
    def name(self) -> str:
        """With dots; it stays the same when the parameter is wrapped."""
        return dotted(self.path)


def places(model: LanguageModel) -> list[Place]:
    """Every dense parameter of the model."""
    return [_place(path, variable) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def weights(model: LanguageModel) -> dict[tuple[Any, ...], nnx.Param | Weight]:
    """Everything that stands for one array, by path: dense parameters and `Weight`s, not what these wrap."""
    compressed = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Weight)}
    found = {place.path: place.value for place in places(model)} | compressed
    return {path: held for path, held in found.items() if not any(path[:i] in compressed for i in range(len(path)))}


def replace(model: LanguageModel, path: tuple[Any, ...], value: nnx.Param | nnx.Module) -> tuple[Any, ...]:
    """Puts another object at a path, or in place of the `FakeQuantized` whose body is there; returns where it is."""
    if isinstance(holder(model, path), FakeQuantized):
        path = path[:-1]
    *_, last = path
    of: Any = holder(model, path)
    if isinstance(last, int):
        of[last] = value
    else:
        setattr(of, last, value)
    return path


def holder(model: LanguageModel, path: tuple[Any, ...]) -> Any:
    """What has the object at a path."""
    found: Any = model
    for name in path[:-1]:
        found = found[name] if isinstance(name, int) else getattr(found, name)
    return found


def part(of: nnx.Param, value: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
    """A parameter that comes of another, with what that one says of itself but for its axes."""
    metadata: dict[str, Any] = of.get_metadata() | {"axes": axes}
    return nnx.Param(value, **metadata)


def dotted(path: tuple[Any, ...]) -> str:
    """A path as text; what a weight wraps (its `body`) has the weight's name."""
    return ".".join(str(part) for part in path if part != "body")


def kind_of_layer(config: ModelConfig, path: tuple[Any, ...]) -> str:
    """The kind of layer that a parameter belongs to."""
    kinds = {kind: name for name, kind in LAYERS.items()}
    match path:
        case ("periods", "blocks", int(i), "mixer" | "channel" as part, *_):
            return kinds[type(getattr(config.pattern[i], part))]
        case ("prefix", int(i), "mixer" | "channel" as part, *_):
            return kinds[type(getattr(config.prefix[i], part))]
        case (*_, "mixer_norm" | "channel_norm" | "norm" | "embedding_norm", _):
            return "norms"
        case (first, *_):
            return str(first)
    raise AssertionError(path)


def _place(path: tuple[Any, ...], variable: nnx.Param) -> Place:
    metadata = variable.get_metadata()
    axes, kind, left = metadata["axes"], None, metadata["precise"]
    if left:
        return Place(path, variable, axes, kind, left)
    if metadata["matrix"]:
        kind = "head" if axes[-1] == "vocab" else "values" if axes[-1] == "kept" else "matrix"
    elif axes == ("vocab", "embed"):
        kind = "table"
    else:
        left = "no matrix"
    return Place(path, variable, axes, kind, left)
