"""What a checkpoint format is: a table from its tensors to ours, read in both directions, and the flags of its config.

Our names are canonical and unstacked: `embedding.weight`, `blocks.3.mixer.q.weight` (the model's fourth block, prefix
included), `norm.scale`, `head.weight`. `phyla.models.formats.source` knows where each lies in the stacked model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from phyla.models.config import Activation, ModelConfig
from phyla.models.errors import UserError

Arrays = tuple[np.ndarray, ...]


class Entry(NamedTuple):
    """Some of our parameters, the tensors of the checkpoint that hold them, and the way between, exact both ways."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., Arrays]
    """(*their arrays) -> our arrays"""
    write: Callable[..., Arrays]
    """(*our arrays) -> their arrays"""


class Format(NamedTuple):
    """A family of checkpoints: safetensors and a config.json."""

    name: str
    """The `model_type` of its config.json."""
    config: Callable[[dict], ModelConfig]
    """From config.json; reads every flag. UserError names an unknown flag or value."""
    to_config: Callable[[ModelConfig], dict]
    """The inverse; UserError where the format cannot say what the model does."""
    entries: Callable[[ModelConfig], Iterable[Entry]]
    """Every tensor of the checkpoint and every parameter of the model exactly once, in layer order."""
    optional_prefix: str = ""
    """Of tensor names in `entries`: some checkpoints leave it out (a base model saved without its head)."""
    tied: tuple[str, str] | None = None
    """The head and the embedding: where the model ties them, a checkpoint may hold the head too, if it is equal."""
    buffers: tuple[str, ...] = ()
    """Regular expressions of whole names: tensors that some checkpoints hold and that are no parameters."""
    complete: Callable[[dict, Mapping[str, tuple[int, ...]]], dict] = lambda raw, shapes: raw
    """(config.json, shapes of the tensors) -> config.json with what only the shapes tell."""


def same(ours: str, theirs: str) -> Entry:
    """The same array."""
    return Entry((ours,), (theirs,), lambda x: (x,), lambda x: (x,))


def transposed(ours: str, theirs: str) -> Entry:
    """A matrix: ours (in, out), theirs (out, in)."""
    return Entry((ours,), (theirs,), lambda x: (x.T,), lambda x: (x.T,))


def reshaped(ours: str, theirs: str, shape: Sequence[int], their_shape: Sequence[int]) -> Entry:
    """The same numbers in the same order: ours of `shape`, theirs of `their_shape`."""
    return Entry(
        (ours,),
        (theirs,),
        lambda x: (x.reshape(shape),),
        lambda x: (x.reshape(their_shape),),
    )


def depthwise(ours: str, theirs: str) -> Entry:
    """A causal convolution's taps: ours (taps, channels), theirs (channels, 1, taps)."""
    return Entry((ours,), (theirs,), lambda x: (x[:, 0].T,), lambda x: (x.T[:, None],))


def fused(ours: Sequence[str], theirs: str, sizes: Sequence[int], *, transpose: bool = True) -> Entry:
    """Several of our matrices or vectors in one of theirs, one after the other.

    Args:
        ours: our names.
        theirs: their name.
        sizes: the outputs of each of ours.
        transpose: whether theirs is (out, in), outputs on the first axis; else on the last. Vectors do not care.
    """

    def read(x: np.ndarray) -> Arrays:
        return tuple(np.split(x.T if transpose else x, np.cumsum(sizes)[:-1], axis=-1))

    def write(*parts: np.ndarray) -> Arrays:
        x = np.concatenate(parts, axis=-1)
        return (x.T if transpose else x,)

    return Entry(tuple(ours), (theirs,), read, write)


def linear(ours: str, theirs: str, *, bias: bool = False, transpose: bool = True) -> list[Entry]:
    """A `Linear`: its weight, (out, in) in the checkpoint if `transpose`, and its bias."""
    weight = transposed if transpose else same
    return [weight(f"{ours}.weight", f"{theirs}.weight")] + [same(f"{ours}.bias", f"{theirs}.bias")] * bias


def norm(ours: str, theirs: str, *, bias: bool = False) -> list[Entry]:
    """An `RMSNorm`, or a `LayerNorm` if `bias`: `scale` is `weight` in the checkpoint."""
    return [same(f"{ours}.scale", f"{theirs}.weight")] + [same(f"{ours}.bias", f"{theirs}.bias")] * bias


ACTIVATIONS: dict[str, Activation] = {  # transformers' names; of several for one of ours, the first is written
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}


def inverse(table: dict[str, Any], ours: Any) -> str:
    """The first key with this value. Raises UserError if there is none."""
    for theirs, value in table.items():
        if value == ours:
            return theirs
    raise UserError(f"the format has no name for {ours!r}; supported: {', '.join(map(repr, table.values()))}")


_IGNORED = """
_attn_implementation _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
gradient_checkpointing id2label initializer_range is_encoder_decoder keys_to_ignore_at_inference label2id max_length
model_type name_or_path num_labels output_attentions output_hidden_states output_past pad_token_id pretraining_tp
problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype transformers_version unk_token_id
use_cache
"""
IGNORED = frozenset(_IGNORED.split())
"""Flags of config.json that do not change the mathematics of inference, whatever the family."""


class Flags:
    """The flags of a config.json. Each must be taken, checked or known not to matter: `done` names what is left.

    A family's `config` reads `flags.take("hidden_size")`, `flags.take("head_dim", None)` (a default),
    `flags.only("hidden_act", "silu")` (one supported value, also the default) and
    `flags.choose("hidden_act", {"gelu_new": "gelu_tanh"})`; then `flags.done("attention_dropout", …)`.
    """

    def __init__(self, raw: dict):
        self.raw = raw
        self.taken: set[str] = set()

    def take(self, key: str, *default: Any) -> Any:
        """The value of a flag; UserError where it is absent and has no default."""
        if key not in self.raw and not default:
            raise UserError(f"no {key}")
        self.taken.add(key)
        return self.raw.get(key, *default)

    def choose(self, key: str, values: dict, *default: Any) -> Any:
        """Our value for theirs; UserError for one that is not among them."""
        value = self.take(key, *default)
        if value not in values:
            known = ", ".join(map(repr, values))
            raise UserError(f"{key} is {value!r}; supported: {known}")
        return values[value]

    def only(self, key: str, value: Any) -> None:
        """A flag of which one value is supported; the flag may be absent."""
        found = self.take(key, value)
        if found != value:
            raise UserError(f"{key} is {found!r}; supported: {value!r}")

    def done(self, *ignored: str) -> None:
        """UserError if flags are left that are neither in IGNORED nor among `ignored` (of no matter to this family)."""
        left = sorted(self.raw.keys() - self.taken - IGNORED - set(ignored))
        if left:
            raise UserError(f"unknown flag {left[0]} = {self.raw[left[0]]!r}")
