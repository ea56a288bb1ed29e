"""What a model remembers before the first token, learned: prompts, prefixes and states are all a `ModelState`.

A prompt of virtual tokens is the state after the model has read them; a prefix is such a state itself, whose keys and
values, or whose recurrent states, are parameters. So every architecture has each, in training, in evaluation and in
generation, and the state is computed once for a whole batch.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.cursor import Cursor
from phyla.models.language_model import LanguageModel, ModelState
from phyla.models.layers import Linear
from phyla.models.quantized import Fixed
from phyla.models.weights import constant, normal, parameter


class Beginning(nnx.Module):
    """See above."""

    tokens: int
    """As how many tokens it counts: those that follow have positions after them."""

    @abc.abstractmethod
    def one(self, model: LanguageModel) -> ModelState:
        """Of a batch of one sequence, full."""

    def state(self, model: LanguageModel, batch: int, length: int, segment_ids: jax.Array | None = None) -> ModelState:
        """For `batch` sequences, with room for `length` tokens; it is of each one's first segment."""
        shapes = [jax.tree.leaves(jax.eval_shape(lambda n=n: model.empty_state(n, self.tokens))) for n in (1, 2)]
        leaves, structure = jax.tree.flatten(self.one(model))
        wide = [
            leaf if one.shape == two.shape else jnp.repeat(leaf, batch, axis=_batch_axis(one.shape, two.shape))
            for leaf, one, two in zip(leaves, *shapes, strict=True)
        ]
        state = jax.tree.unflatten(structure, wide)
        if segment_ids is not None:
            first_B = segment_ids[:, 0].astype(jnp.int32)
            state = jax.tree.map(lambda node: _of_segment(node, first_B), state, is_leaf=_is_cursor)
        return model.with_room(state, length)


def _batch_axis(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    return next(axis for axis, sizes in enumerate(zip(one, two, strict=True)) if sizes[0] != sizes[1])


def _is_cursor(node: Any) -> bool:
    return isinstance(node, Cursor)


def _of_segment(node: Any, first_B: jax.Array) -> Any:
    if not _is_cursor(node):
        return node
    return node._replace(segment_B=jnp.broadcast_to(first_B, node.segment_B.shape))


class LearnedState(Beginning):
    """Every number that mixers and channel mixers remember is a parameter.

    With no tokens it is the state of recurrent layers alone, zero at first: state tuning, as RWKV's users know it. With
    some it is also as many keys and values in each layer of attention (Liu et al. 2021, arXiv 2110.07602, P-tuning v2;
    Li and Liang 2021, arXiv 2101.00190, without their reparametrisation), and begins as the state after real tokens.
    """

    def __init__(self, state: ModelState, tokens: int, precise: str):
        """Begins with what a model remembers of a batch of one sequence of so many tokens."""
        self.tokens = tokens
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(state)
        self.names = tuple(jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves)
        self.shapes = tuple(leaf.shape for _, leaf in leaves)
        self.dtypes = tuple(str(leaf.dtype) for _, leaf in leaves)
        rngs = nnx.Rngs(0)
        for name, (_, leaf) in zip(self.names, leaves, strict=True):
            axes = ("state",) * leaf.ndim
            if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating):
                setattr(self, name, parameter(lambda *_, v=leaf: jnp.array(v), leaf.shape, axes, rngs, precise=precise))
            elif leaf.size:
                setattr(self, name, Fixed(leaf, axes=axes))

    def value(self, name: str) -> jax.Array:
        """Of a part of the state."""
        return getattr(self, name)[...]

    def one(self, model: LanguageModel) -> ModelState:
        """See `Beginning.one`."""
        leaves = [
            self.value(name).astype(dtype) if 0 not in shape else jnp.zeros(shape, dtype)
            for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


class EncodedState(LearnedState):
    """Keys and values that a network makes of a vector for each virtual token: prefix tuning with reparametrisation.

    Li and Liang 2021, arXiv 2101.00190, section 4.3: linear, tanh, linear, for training only (`plain`). What it makes
    is added to the keys and values of real tokens, and is zero at first, so that it begins there; the state of
    recurrent layers, which no token has by itself, is learned as it is.
    """

    def __init__(self, model: LanguageModel, state: ModelState, tokens: int, precise: str, rngs: nnx.Rngs):
        """See `LearnedState`; `encoded` is empty if no layer keeps keys and values of so many tokens."""
        super().__init__(state, tokens, precise)
        E, longer = model.embedding.weight.shape[-1], jax.eval_shape(lambda: model.empty_state(1, tokens + 1))
        encoded, size = [], 0
        for name, shape, other in zip(self.names, self.shapes, jax.tree.leaves(longer), strict=True):
            if shape != other.shape and isinstance(held := getattr(self, name, None), nnx.Param):
                setattr(self, name, Fixed(held[...], axes=("state",) * held.ndim))
                encoded.append((name, _batch_axis(shape, other.shape), size))
                size += held.size // tokens
        self.encoded = tuple(encoded)
        self.vectors = parameter(normal(1.0), (tokens, E), ("prompt", "embed"), rngs, precise=precise)
        self.inner = Linear((E, E), ("embed_out", "embed"), rngs, bias=True, precise=precise)
        self.outer = Linear((E, size), ("embed", "state"), rngs, bias=True, precise=precise, init=constant(0.0))

    def value(self, name: str) -> jax.Array:
        """See `LearnedState.value`."""
        found = super().value(name)
        for encoded, axis, first in self.encoded:
            if encoded == name:
                of_tokens = jnp.moveaxis(found, axis, 0)
                made_NxS = self.outer(jnp.tanh(self.inner(self.vectors[...])))
                own = made_NxS[:, first : first + of_tokens[0].size].reshape(of_tokens.shape)
                return found + jnp.moveaxis(own, 0, axis)
        return found

    def plain(self, model: LanguageModel, precise: str) -> LearnedState:
        """The same without the network."""
        return LearnedState(self.one(model), self.tokens, precise)


class Prompt(Beginning):
    """Virtual tokens: vectors in the place of embeddings (Lester et al. 2021, arXiv 2104.08691)."""

    def __init__(self, begin: jax.Array, precise: str):
        """Begins with vectors [n, E]."""
        self.tokens = len(begin)
        axes = ("prompt", "embed")
        self.vectors = parameter(lambda *_: begin, begin.shape, axes, nnx.Rngs(0), precise=precise)

    def embeddings(self) -> jax.Array:
        """Of the virtual tokens, [n, E]."""
        return self.vectors[...]

    def one(self, model: LanguageModel) -> ModelState:
        """See `Beginning.one`."""
        vectors = self.embeddings()[None].astype(jnp.float32)
        state = model.forward_embedded(vectors, model.empty_state(1, self.tokens)).state
        assert state is not None
        return state


class EncodedPrompt(Prompt):
    """Virtual tokens that a network makes of vectors: P-tuning (Liu et al. 2021, arXiv 2103.10385), with PEFT's MLP."""

    def __init__(self, shape: tuple[int, ...], precise: str, rngs: nnx.Rngs):
        """Begins with vectors [n, E] of this shape at random."""
        super().__init__(normal(1.0)(rngs.params(), shape), precise)
        E = shape[-1]
        self.layers = nnx.List(
            [Linear((E, E), ("embed_out", "embed"), rngs, bias=True, precise=precise) for _ in range(3)]
        )

    def embeddings(self) -> jax.Array:
        """See `Prompt.embeddings`."""
        x = self.vectors[...]
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else jax.nn.relu(x))
        return x

    def plain(self, model: LanguageModel, precise: str) -> Prompt:
        """The same without the network."""
        return Prompt(self.embeddings(), precise)
