"""A foreign model, opened; and the way of its tensors, one at a time, into the stacked parameters and back."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from phyla.models import sizes
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry

Shapes = dict[str, tuple[int, ...]]


class Vocabulary(NamedTuple):
    """The tokenizer that a file holds beside its tensors."""

    core: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    template: str | None = None
    """The jinja program that writes conversations."""
    names: tuple[tuple[str, str], ...] = ()
    """That it knows special tokens by: (`bos_token`, "<s>"), …"""


class Source(NamedTuple):
    """A foreign model of which only names and shapes have been read."""

    where: Path
    model: ModelConfig
    entries: Sequence[Entry]
    shapes: Shapes
    """Of the checkpoint's tensors, by the names of `entries`."""
    read: Callable[[str], np.ndarray]
    """A tensor as float32."""
    vocabulary: Vocabulary | None = None
    """None: the source has none in itself."""

    def check(self) -> None:
        """Raises UserError, naming the tensor, if one is missing, surplus or of another shape than the model's."""
        expected = checkpoint_shapes(self.model, self.entries)
        for name, shape in expected.items():
            if name not in self.shapes:
                raise UserError(f"{self.where} has no tensor {name} {list(shape)}")
            if self.shapes[name] != shape:
                raise UserError(
                    f"{self.where}: tensor {name} has shape {list(self.shapes[name])}; "
                    f"its configuration says {list(shape)}"
                )
        if surplus := sorted(self.shapes.keys() - expected.keys()):
            raise UserError(f"{self.where}: its configuration has no place for the tensor {surplus[0]}")


def place(model: ModelConfig, name: str) -> tuple[str, int | None]:
    """Where the parameter of an unstacked name lies: its path, and its index there if it is stacked."""
    head, _, rest = name.partition(".")
    if head != "blocks":
        return name, None
    block, _, rest = rest.partition(".")
    after_prefix = int(block) - len(model.prefix)
    if after_prefix < 0:
        return f"prefix.{block}.{rest}", None
    repeat, position = divmod(after_prefix, len(model.pattern))
    uses = model.repeats // (model.groups or model.repeats)
    return f"periods.blocks.{position}.{rest}", repeat // uses


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Of every parameter, by its path."""
    state = nnx.to_flat_state(nnx.state(sizes.abstract(model)))
    return {".".join(map(str, path)): variable.shape for path, variable in state}


def checkpoint_shapes(model: ModelConfig, entries: Iterable[Entry]) -> Shapes:
    """Of every tensor of the checkpoint: what the entries would write.

    Raises ValueError if the entries do not cover the model, which is a bug in their table.
    """
    ours, left, shapes = parameter_shapes(model), set(), {}
    for path, shape in ours.items():
        left |= {(path, i) for i in range(shape[0])} if path.startswith("periods.") else {(path, None)}

    def blank(name: str) -> np.ndarray:
        path, index = place(model, name)
        left.remove((path, index))
        return np.broadcast_to(np.int8(1), ours[path] if index is None else ours[path][1:])

    for entry in entries:
        arrays = entry.write(*map(blank, entry.ours))
        shapes |= {name: array.shape for name, array in zip(entry.theirs, arrays, strict=True)}
    if left:
        raise ValueError(f"no entry for {sorted(left, key=str)}")
    return shapes


@dataclass(frozen=True)
class Lazy:
    """A parameter that is read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """The array, float32."""
    dtype = np.dtype(np.float32)


def load(source: Source) -> dict[str, Lazy]:
    """Every parameter by its path, stacked. Reading one takes its own memory and that of one entry's tensors.

    Raises UserError as `Source.check` does.
    """
    source.check()
    shapes = parameter_shapes(source.model)
    pieces: dict[str, list[tuple[Entry, int, int | None]]] = {path: [] for path in shapes}
    for entry in source.entries:
        for position, name in enumerate(entry.ours):
            path, index = place(source.model, name)
            pieces[path].append((entry, position, index))

    def read(path: str) -> np.ndarray:
        def piece(entry: Entry, position: int, shape: tuple[int, ...]) -> np.ndarray:
            array = entry.read(*map(source.read, entry.theirs))[position]
            if array.shape != shape:
                raise ValueError(f"{entry.ours[position]} was read as {array.shape}, not {shape}")
            return array

        if pieces[path][0][2] is None:
            return np.ascontiguousarray(piece(*pieces[path][0][:2], shapes[path]))
        whole = np.empty(shapes[path], np.float32)
        for entry, position, index in pieces[path]:
            whole[index] = piece(entry, position, shapes[path][1:])
        return whole

    return {path: Lazy(shape, functools.partial(read, path)) for path, shape in shapes.items()}


def tensors(
    model: ModelConfig, entries: Iterable[Entry], parameters: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors, in the entries' order."""

    def ours(name: str) -> np.ndarray:
        path, index = place(model, name)
        return parameters[path] if index is None else parameters[path][index]

    for entry in entries:
        yield from zip(entry.theirs, entry.write(*map(ours, entry.ours)), strict=True)


def to_state(model: ModelConfig, parameters: Mapping[str, Any]) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition of the model, and its parameters with these values by their paths, which are not copied."""
    graphdef, state = nnx.split(sizes.abstract(model))
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(parameters[".".join(map(str, path))])
    return graphdef, state


def build(source: Source) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and parameters, as JAX arrays. Raises UserError as `Source.check` does."""
    return to_state(source.model, {path: jnp.asarray(lazy.read()) for path, lazy in load(source).items()})


def from_state(state: nnx.State) -> dict[str, np.ndarray]:
    """Every parameter by its path."""
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}
