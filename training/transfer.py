"""A new model that begins with what fits of another's parameters: the student with its teacher's, in distillation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.mixers.mlstm import MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6Config
from phyla.models.mixers.rwkv7 import RWKV7Config

Path = tuple[Any, ...]
Parameters = dict[Path, nnx.Variable]


class Transfer(NamedTuple):
    """A model, and what became of its parameters."""

    model: LanguageModel
    copied: dict[str, float]
    """Name of each parameter that has something of the teacher's, and which share of it that is."""
    left: dict[str, str]
    """Name of each other one, and why."""


def initialise_from(student: LanguageModel, teacher: LanguageModel) -> Transfer:
    """The student with every parameter that the teacher has at the same place in the same shape.

    Layer i of L takes from the teacher's layer nearest to the same depth, (L' - 1) · i / (L - 1) of L' (with L = 6 and
    L' = 12 those of DistilBERT). Where the teacher has attention and the student a recurrent mixer, the value
    projection becomes that of its input, the keys' what writes, the queries' what reads, and the output's the output's
    (Wang et al. 2024, "The Mamba in the Llama", section 2), whichever of these have the same shape; keys and values
    that several heads share are repeated.
    """
    graphdef, params, rest = nnx.split(student, nnx.Param, ...)
    mine: Parameters = dict(nnx.to_flat_state(params))
    its: Parameters = dict(nnx.to_flat_state(nnx.state(teacher, nnx.Param)))
    ours, theirs = _layers(student.config), _layers(teacher.config)
    source = np.rint(np.linspace(0, len(theirs) - 1, len(ours))).astype(int)
    copied, left, after = {}, {}, []
    for path, variable in mine.items():
        name, old = ".".join(map(str, path)), np.array(variable[...])
        new, taken, why = old.copy(), 0, ""
        pieces = [] if path[0] in ("prefix", "periods") else [(new, _array(its.get(path)))]
        for layer, (holder, index, block) in enumerate(ours):
            if path[: len(holder)] == holder:
                part, there = new if index is None else new[index, ...], theirs[source[layer]]
                pieces += _of_block(part, path[len(holder) :], block, there, its, student.config, teacher.config)
        for part, value in pieces:
            if value is None:
                why = "the teacher has none"
            elif value.shape != part.shape:
                why = f"{_shape(part)} here, {_shape(value)} there"
            else:
                part[...] = value
                taken += part.size
        if taken:
            copied[name] = min(1.0, taken / old.size)
        else:
            left[name] = why
        after.append((path, variable.replace(jnp.asarray(new))))
    model = nnx.merge(graphdef, nnx.from_flat_state(after), rest)
    return Transfer(model, copied, left)


def summary(copied: dict[str, float], left: dict[str, str]) -> str:
    """Two lines: what of a `Transfer` is copied, and what is not."""
    of_copied = (name if share == 1 else f"{name} ({share:.0%})" for name, share in copied.items())
    of_left = (f"{name} ({why})" for name, why in left.items())
    return f"copied from the teacher: {_listed(of_copied)}\nnew: {_listed(of_left)}"


Located = tuple[Path, int | None, BlockConfig]
"""Where a layer's parameters are: under this path, and at this index where they are stacked; and what it is."""


def _layers(config: ModelConfig) -> list[Located]:
    found: list[Located] = [(("prefix", i), None, block) for i, block in enumerate(config.prefix)]
    uses = config.repeats // (config.groups or config.repeats)
    for repeat in range(config.repeats):
        found += [(("periods", "blocks", i), repeat // uses, block) for i, block in enumerate(config.pattern)]
    return found


def _of_block(
    part: np.ndarray,
    rest: Path,
    block: BlockConfig,
    there: Located,
    its: Parameters,
    mine: ModelConfig,
    teachers: ModelConfig,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(view of the student's parameter, the teacher's array for it)."""
    holder, index, other = there

    def of(*rest: Any) -> np.ndarray | None:
        value = _array(its.get((*holder, *rest)))
        return value if value is None or index is None else value[index]

    kinds = {"mixer": (block.mixer, other.mixer), "channel": (block.channel, other.channel)}
    ours, theirs = kinds.get(rest[0], (None, None))
    if type(ours) is type(theirs):
        yield part, of(*rest)
        return
    found = False
    if isinstance(theirs, AttentionConfig) and isinstance(ours, LayerConfig) and rest[-1] == "weight":
        for name, columns in _from_attention(ours, mine).get(rest[1], ()):
            value = of("mixer", name, "weight")
            if value is not None and name in "kv":
                value = _every_head(value, theirs, teachers)
            yield part[:, columns], value
            found = True
    if not found:
        yield part, None


def _from_attention(mixer: LayerConfig, model: ModelConfig) -> dict[str, tuple[tuple[str, slice], ...]]:
    """Of a recurrent mixer's matrices, which columns do what which of attention's does."""
    match mixer:
        case Mamba2Config() | Mamba3Config():
            inner, shared = mixer.inner(model), mixer.groups * mixer.state
            x, write = slice(inner, 2 * inner), slice(2 * inner, 2 * inner + shared)
            read = slice(write.stop, write.stop + shared)
            return {"in_proj": (("v", x), ("k", write), ("q", read)), "out_proj": (("o", slice(None)),)}
        case MambaConfig():
            # B and C are made of x there, not of the layer's input.
            return {"in_proj": (("v", slice(0, mixer.inner(model))),), "out_proj": (("o", slice(None)),)}
        case MLSTMConfig():
            names = {"q": "q", "k": "k", "v": "v", "out": "o"}
        case RWKV4Config() | RWKV6Config() | RWKV7Config():
            names = {"receptance": "q", "key": "k", "value": "v", "output": "o"}
        case _:
            names = {}
    return {ours: ((theirs, slice(None)),) for ours, theirs in names.items()}


def _every_head(value: np.ndarray, attention: AttentionConfig, model: ModelConfig) -> np.ndarray:
    """[D, K · H] to [D, N · H]: each query head with the keys or values that it uses."""
    heads = value.reshape(len(value), -1, attention.resolved_head_dim(model))
    return np.repeat(heads, attention.heads // heads.shape[1], axis=1).reshape(len(value), -1)


def _array(variable: nnx.Variable | None) -> np.ndarray | None:
    return None if variable is None else np.asarray(jax.device_get(variable[...]))


def _shape(array: np.ndarray) -> str:
    return " × ".join(map(str, array.shape))


def _listed(names: Iterator[str]) -> str:
    return ", ".join(names) or "nothing"
