"""Recipes that freeze a model and train a few numbers of no matrix: biases, the state before the first token."""

import difflib
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
from flax import nnx

from phyla.compression import matrices
from phyla.compression.adapters import PART
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models.beginnings import EncodedPrompt, EncodedState, LearnedState, Prompt
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.weights import freeze, take, trainable, unfreeze

BIASES = r"(^|[._])bias$|mixer\.[wav]0$"
"""What is added to the output of a matrix, a convolution or a norm; an RWKV-7's w0, a0 and v0 to its low-rank maps."""


@dataclass(frozen=True, kw_only=True)
class BitFit(Rule):
    """Only biases are trained (Ben Zaken et al. 2022, arXiv 2106.10199), or the parameters that `only` finds."""

    keeps_base: ClassVar[bool] = True

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "bitfit"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError if there are none."""
        freeze(model)
        able = {matrices.dotted(path): each for path, each in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        found = {name: each for name, each in able.items() if re.search(self.only or BIASES, name)}
        if not found:
            nearest = difflib.get_close_matches(self.only or "norm.bias", able, n=1, cutoff=0.0)[0]
            said = f"'{self.only}' is in no parameter's path" if self.only else "it has no biases"
            raise UserError(f"{self} trains nothing in this model: {said}; nearest: bitfit@{nearest}")
        for each in found.values():
            each.set_metadata(trainable=True)
        left = {place.name: "frozen" for place in chosen if place.name not in found}
        return Applied(model, left, tuple(found))


@dataclass(frozen=True, kw_only=True)
class Thaw(Rule):
    """All parameters are trained again. What is of few bits is none."""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "thaw"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError if none is frozen."""
        if self.only:
            raise UserError(f"thaw is for the whole model: leave @{self.only} out")
        found = nnx.to_flat_state(nnx.state(model, nnx.Param))
        frozen = [matrices.dotted(path) for path, each in found if not trainable(path, each)]
        if not frozen:
            raise UserError("thaw: no parameter of this model is frozen")
        unfreeze(model)
        return Applied(model, {place.name: "not frozen" for place in chosen if place.name not in frozen}, tuple(frozen))


@dataclass(frozen=True, kw_only=True)
class Begin(Rule):
    """Only what the model remembers before the first token is trained (`phyla.models.beginnings`)."""

    keeps_base: ClassVar[bool] = True
    kind: Literal["state", "prefix", "prompt", "ptuning"]
    tokens: int = 0
    """How many virtual tokens."""
    network: bool = False
    """Whether a prefix is trained through a network; P-tuning's prompt always is."""

    def __post_init__(self):
        super().__post_init__()
        if self.only:
            raise UserError(f"{self.method} is for the whole model: leave @{self.only} out")
        if self.kind != "state" and self.tokens < 1:
            raise UserError(f"{self.method}: there must be a virtual token; nearest: {self.kind}-1")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return self.kind if self.kind == "state" else f"{self.kind}-{self.tokens}" + "-mlp" * self.network

    @property
    def plain(self) -> "Begin":
        """What is left of it without the network."""
        return replace(self, kind="prompt" if self.kind == "ptuning" else self.kind, network=False)

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError for a model that remembers nothing, or not without virtual tokens."""
        config = model.config
        if config.bidirectional:
            raise UserError(f"{self}: a model that sees both sides keeps no state; adapt its matrices")
        if model.beginning is not None:
            raise UserError(f"{self}: this model has a learned beginning already")
        if config.learned_positions and self.tokens >= config.learned_positions:
            raise UserError(f"{self} leaves no position of model.learned_positions {config.learned_positions}")
        assert config.vocab_size is not None
        freeze(model)
        for_words, own = jax.random.split(key)
        words = jax.random.randint(for_words, (self.tokens,), 0, config.vocab_size)
        rngs, begin = nnx.Rngs(params=own), take(model.embedding.weight, words)
        match self.kind:
            case "prompt":
                model.beginning = Prompt(begin, PART)
            case "ptuning":
                model.beginning = EncodedPrompt(begin.shape, PART, rngs)
            case _:
                state = model.empty_state(1, self.tokens)
                if self.tokens:
                    state = model(words[None], state)[1]
                if self.network:
                    model.beginning = EncodedState(model, state, self.tokens, PART, rngs)
                    if not model.beginning.encoded:
                        why = f"no layer of this model has keys and values of {self.tokens} tokens"
                        raise UserError(f"{self}: {why}; nearest: {self.plain}")
                else:
                    model.beginning = LearnedState(state, self.tokens, PART)
        learned = nnx.to_flat_state(nnx.state(model.beginning, nnx.Param))
        if not learned:
            raise UserError(f"{self}: no layer of this model has a state of its own; nearest: prefix-16")
        left = {place.name: "frozen" for place in chosen}
        return Applied(model, left, tuple(matrices.dotted(("beginning", *path)) for path, _ in learned))


def _begin(kind: Literal["prefix", "prompt", "ptuning"], summary: str, *, network: bool = False) -> dict[str, Method]:
    make = lambda found, only: Begin(kind=kind, tokens=int(found[1]), network=network, only=only)  # noqa: E731
    end = "-mlp" * network
    return {f"{kind}-16{end}": Method(rf"{kind}-(\d+){end}", make, summary)}


METHODS = {
    "state": Method("state", lambda _, only: Begin(kind="state", only=only), "trains the state before the first token"),
    **_begin("prefix", "the same after 16 virtual tokens, and so many keys and values in each layer of attention"),
    **_begin("prefix", "the same through a network, of which merge leaves the keys and values", network=True),
    **_begin("prompt", "trains the embeddings of 16 virtual tokens before the text"),
    **_begin("ptuning", "the same through a small network"),
    "bitfit": Method("bitfit", lambda _, only: BitFit(only=only), "trains biases alone"),
    "thaw": Method("thaw", lambda _, only: Thaw(only=only), "trains all parameters again, after bitfit or a stage"),
}
"""See `phyla.compression.recipes`."""
