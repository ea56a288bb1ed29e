"""The language model: embeddings, blocks, a norm and a head."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phyla.models.block import Block, Period
from phyla.models.config import Activation, ModelConfig
from phyla.models.cursor import Cursor, advance, start
from phyla.models.documents import apart
from phyla.models.errors import UserError
from phyla.models.held import alike
from phyla.models.layers import ACTIVATIONS, Embedding, Linear, build_norm
from phyla.models.weights import constant, materialize, orthogonal, parameter, uniform


class ModelState(NamedTuple):
    """What the model remembers of the tokens so far. A block's state is those of its mixer and its channel mixer."""

    prefix: tuple[Any, ...]  # one for each block of the prefix
    blocks: tuple[Any, ...]  # one for each block of the pattern, stacked over its repeats; see `unrolled`
    cursor: Cursor

    def unrolled(self, repeats: int) -> "ModelState":
        """The same for an `unrolled` model: `blocks` has one tuple for each repeat, of its blocks."""
        return self._replace(blocks=tuple(_one(self.blocks, i) for i in range(repeats)))

    def stacked(self) -> "ModelState":
        """Undoes `unrolled`."""
        return self._replace(blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.blocks))


class Output(NamedTuple):
    """Of a model."""

    hidden: jax.Array  # [B, T, D] in the compute dtype, normalised, for `logits`
    state: ModelState | None  # after the last token; None if None was given
    routing: tuple[Any, ...]  # a `Routing` of each mixture of experts in prefix and pattern, stacked over layers
    layers: jax.Array | None = None  # float32 [L + 1, B, T, D], the residual stream before and after every block


class HeadTransform(nnx.Module):
    """norm(activation(linear(x))), from the model's width to the embedding's (Devlin et al. 2019, the MLM head)."""

    def __init__(self, model: ModelConfig, activation: Activation, width: int, rngs: nnx.Rngs):
        self.linear = Linear((model.width, width), ("embed", "embed_out"), rngs, bias=True)
        self.norm = build_norm(model, rngs, width)
        self.activation: Activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., E]."""
        return self.norm(ACTIVATIONS[self.activation](self.linear(x))).astype(x.dtype)


class LanguageModel(nnx.Module):
    """A model built from its configuration.

    The blocks of the pattern are stacked over its repeats and scanned, so that compile time does not grow with depth.

    Raises UserError, naming the field, where the configuration contradicts itself.
    """

    beginning: Any = None
    """What it remembers before the first token, if that is learned (`phyla.models.beginnings`); None: nothing."""
    subspace: Any = None
    """In which all its parameters move together (`phyla.models.subspace`); None: they are what they are."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set: the tokenizer decides it")
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        D, E = config.width, config.embedding_width or config.width
        rwkv = config.embedding_init == "rwkv"
        self.embedding = Embedding(config.vocab_size, E, rngs, init=uniform(1e-4) if rwkv else None)
        if config.learned_positions:
            self.position_embedding = Embedding(config.learned_positions, E, rngs, axes=("positions", "embed"))
        if config.token_types:
            self.type_embedding = Embedding(config.token_types, E, rngs, axes=("token_types", "embed"))
        if config.embedding_norm:
            self.embedding_norm = build_norm(config, rngs, E)
        if config.embedding_width:
            self.embedding_projection = Linear((E, D), ("embed_out", "embed"), rngs, bias=True)
        self.prefix = nnx.List([Block(block, config, rngs, i) for i, block in enumerate(config.prefix)])
        groups = config.groups or config.repeats
        keys = jax.random.split(rngs.params(), groups)
        firsts = len(config.prefix) + jnp.arange(groups) * (config.repeats // groups) * len(config.pattern)
        self.periods = jax.vmap(lambda key, layer: Period(config, nnx.Rngs(params=key), layer))(keys, firsts)
        for _, variable in nnx.to_flat_state(nnx.state(self.periods)):
            variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
        if config.final_norm:
            self.norm = build_norm(config, rngs)
        if config.head_transform:
            self.head_transform = HeadTransform(config, config.head_transform, E, rngs)
        if not config.tie_embeddings:
            width = E if config.head_transform else D
            init = orthogonal(0.5 * max(1.0, config.vocab_size / width) ** 0.5) if rwkv else None
            self.head = Linear((width, config.vocab_size), ("embed", "vocab"), rngs, init=init)
        if config.pooler:
            self.pooler = Linear((D, D), ("embed", "embed_out"), rngs, bias=True)
        if config.head_bias:
            self.head_bias = parameter(constant(0.0), (config.vocab_size,), ("vocab",), rngs)

    def block(self, index: int) -> Block:
        """Block number `index`, from 0, with its own parameters."""
        if index < len(self.prefix):
            return self.prefix[index]
        return _one(self.periods.blocks[self.place(index) - len(self.prefix)], self._stored(index))

    def blocks(self, indices: Sequence[int]) -> Block:
        """The blocks with these numbers, of one place, as one to scan: every parameter [len(indices), ...]."""
        place, count = self.place(indices[0]), len(indices)
        if place < len(self.prefix):
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), self.prefix[place])
        stored = np.array([self._stored(index) for index in indices])
        return jax.tree.map(lambda leaf: leaf[stored], self.periods.blocks[place - len(self.prefix)])

    def place(self, index: int) -> int:
        """Where block number `index` stands: in the prefix, or after it in the pattern."""
        beyond = index - len(self.prefix)
        return index if beyond < 0 else len(self.prefix) + beyond % len(self.config.pattern)

    def _stored(self, index: int) -> int:
        """Where the stack has the parameters of a block of the pattern."""
        repeat = (index - len(self.prefix)) // len(self.config.pattern)
        return repeat // (self.config.repeats // (self.config.groups or self.config.repeats))

    def initial_state(self, batch: int, length: int) -> ModelState:
        """The state before the first token, with room for `length` tokens where a mixer keeps them all."""
        floats = self.empty_state(batch, length)
        held = ModelState(
            prefix=tuple(map(Block.in_few_bits, self.prefix, floats.prefix)),
            blocks=tuple(map(Block.in_few_bits, self.periods.blocks, floats.blocks)),
            cursor=floats.cursor,
        )
        return held if self.beginning is None else alike(self.beginning.state(self.moved(), batch, length), held)

    def moved(self) -> "LanguageModel":
        """With the parameters that it has where its subspace has moved them; itself if it has no subspace."""
        return self if self.subspace is None else self.subspace.moved(self)

    def empty_state(self, batch: int, length: int) -> ModelState:
        """`initial_state` with nothing learned, and all of it floats."""

        def stacked(block: Block) -> Any:
            state = block.initial_state(batch, length)
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.config.repeats, *leaf.shape)), state)

        return ModelState(
            prefix=tuple(block.initial_state(batch, length) for block in self.prefix),
            blocks=tuple(stacked(block) for block in self.periods.blocks),
            cursor=start(batch),
        )

    def unrolled(self) -> "LanguageModel":
        """The same, for states that are `unrolled` too: no scan, but one repeat of the pattern after the other.

        Compilation takes longer with every layer. What is called again and again inside a program is faster by it: a
        scan copies a layer's parameters and memory out of the stack, and its memory back.
        """
        model = copy.copy(self)
        stored = self.config.groups or self.config.repeats
        model.periods = nnx.List([_one(self.periods, i) for i in range(stored)])
        return model

    def with_room(self, state: ModelState, length: int) -> ModelState:
        """A state that is full, with room for `length` tokens more where a mixer keeps them all."""

        def stacked(block: Block, state: Any) -> Any:
            return jax.vmap(lambda state: block.with_room(state, length))(state)

        return ModelState(
            prefix=tuple(block.with_room(each, length) for block, each in zip(self.prefix, state.prefix, strict=True)),
            blocks=tuple(map(stacked, self.periods.blocks, state.blocks)),
            cursor=state.cursor,
        )

    def __call__(
        self,
        tokens: jax.Array,
        state: ModelState | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """`forward` without the routing: (hidden, state)."""
        return self.forward(tokens, state, segment_ids, token_types)[:2]

    def forward(
        self,
        tokens: jax.Array,
        state: ModelState | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        layers: bool = False,
    ) -> Output:
        """Hidden vectors for `logits`, the state after the last token, and how experts were used.

        Args:
            tokens: integers [B, T].
            state: from `initial_state` or an earlier call; None for a sequence that is given whole.
            segment_ids: [B, T], a number for each document (0: padding); None: one document, or the state's goes on.
            token_types: [B, T], below `config.token_types`; None: all 0.
            layers: whether the residual stream of every layer is wanted too.

        A learned beginning is that of every document (`phyla.models.documents`), also if no state is given.

        Raises UserError for more tokens than learned positions, and for segments that a state with a learned beginning
        goes on with: there they could only begin with nothing.
        """
        if self.subspace is not None:
            return self.moved().forward(tokens, state, segment_ids, token_types, layers=layers)
        limit, before = self.config.learned_positions, self.beginning.tokens if self.beginning is not None else 0
        if limit and tokens.shape[1] + before > limit:
            after = f" after {before} learned ones" * bool(before)
            raise UserError(f"{tokens.shape[1]} tokens{after} do not fit model.learned_positions {limit}")
        if self.beginning is not None and segment_ids is not None:
            if state is not None:
                raise UserError("a state with a learned beginning goes on with one document: leave segment_ids out")
            return self._apart(tokens, segment_ids, token_types, layers)
        begin = state
        if state is None and self.beginning is not None:
            begin = self.beginning.state(self, *tokens.shape)
        found = self.forward_embedded(self.embedding(tokens), begin, segment_ids, token_types, layers=layers)
        return found if state is not None else found._replace(state=None)

    def _apart(self, tokens: jax.Array, segment_ids: jax.Array, token_types: jax.Array | None, layers: bool) -> Output:
        """`forward` of packed documents that begin with what is learned."""
        graphdef, params = nnx.split(self)

        def run(params: nnx.State, inputs: tuple, segment_ids: jax.Array) -> tuple:
            model, (tokens, token_types) = nnx.merge(graphdef, params), inputs
            begin = model.beginning.state(model, *tokens.shape, segment_ids)
            found = model.forward_embedded(model.embedding(tokens), begin, segment_ids, token_types, layers=layers)
            streams = None if found.layers is None else jnp.moveaxis(found.layers, 0, 2)
            return (found.hidden, streams), found.routing

        (hidden, streams), routing = apart(run, params, (tokens, token_types), segment_ids)
        return Output(hidden, None, routing, None if streams is None else jnp.moveaxis(streams, 2, 0))

    def forward_embedded(
        self,
        x: jax.Array,
        state: ModelState | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        layers: bool = False,
    ) -> Output:
        """`forward` for vectors [B, T, E] in the place of tokens' embeddings."""
        if self.subspace is not None:
            return self.moved().forward_embedded(x, state, segment_ids, token_types, layers=layers)
        x_BxTxD, cursor = self._embed(x, state, segment_ids, token_types)
        value, prefix_states, routings, streams = None, [], [], [x_BxTxD]
        for i, block in enumerate(self.prefix):
            before = None if state is None else state.prefix[i]
            x_BxTxD, value, after, routing = block(x_BxTxD, value, before, segment_ids)
            prefix_states.append(after)
            routings += [] if routing is None else [jax.tree.map(lambda leaf: leaf[None], routing)]
            streams.append(x_BxTxD)

        def body(carry, period_and_state):
            period, states = period_and_state
            x, value, states, routing, of_blocks = period(*carry, states, segment_ids)
            return (x, value), (states, routing, of_blocks if layers else ())

        if self.config.remat == "full":
            body = jax.checkpoint(body)
        elif self.config.remat == "dots":
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        states = None if state is None else state.blocks
        (x_BxTxD, _), (states, routing, of_blocks) = self.scan(body, (x_BxTxD, value), states)
        if self.config.final_norm:
            x_BxTxD = self.norm(x_BxTxD)
        after = None if state is None else ModelState(tuple(prefix_states), states, cursor)
        stream = None
        if layers:
            in_pattern = jnp.stack(of_blocks, axis=1).reshape(-1, *x_BxTxD.shape)
            stream = jnp.concatenate([jnp.stack(streams), in_pattern])
        return Output(x_BxTxD.astype(self.dtype), after, (*routings, *routing), stream)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        if self.subspace is not None:
            return self.moved().logits(hidden)
        config = self.config
        if config.head_transform:
            hidden = self.head_transform(hidden)
        elif config.embedding_width and config.tie_embeddings:
            # The embedding is the product of two factors; so is the head.
            hidden = hidden @ materialize(self.embedding_projection.weight).T.astype(hidden.dtype)
        table = self.embedding.logits if config.tie_embeddings else self.head
        logits = table(hidden).astype(jnp.float32)
        if config.head_bias:
            logits += self.head_bias[...]
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return logits

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, D], for whole sentences: of their first token (Devlin et al. 2019)."""
        return jnp.tanh(self.moved().pooler(hidden[:, 0]))

    def _embed(self, x_BxTxE, state, segment_ids, token_types) -> tuple[jax.Array, Cursor]:
        """float32 [B, T, D], and the cursor after the tokens."""
        config, shape = self.config, x_BxTxE.shape[:2]
        _, positions_BxT, cursor = advance(state and state.cursor, segment_ids, *shape)
        if config.learned_positions:
            x_BxTxE += self.position_embedding(positions_BxT)
        if config.token_types:
            x_BxTxE += self.type_embedding(jnp.zeros(shape, jnp.int32) if token_types is None else token_types)
        if config.embedding_norm:
            x_BxTxE = self.embedding_norm(x_BxTxE)
        if config.embedding_width:
            x_BxTxE = self.embedding_projection(x_BxTxE.astype(self.dtype)).astype(jnp.float32)
        return x_BxTxE, cursor

    def scan(self, body: Any, carry: Any, states: Any) -> tuple[Any, Any]:
        """`jax.lax.scan` over the repeats of the pattern; with groups, over those of each group inside.

        Args:
            body: of the carry and (a `Period`, its states).
            carry: what goes from one to the next.
            states: leaves [repeats, ...].
        """
        if isinstance(self.periods, nnx.List):
            uses, found = self.config.repeats // len(self.periods), []
            for i, before in enumerate(states or (None,) * self.config.repeats):
                carry, of_repeat = body(carry, (self.periods[i // uses], before))
                found.append(of_repeat)
            after = tuple(each[0] for each in found)
            return carry, (after, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each[1:] for each in found)))
        if self.config.groups in (None, self.config.repeats):
            return jax.lax.scan(body, carry, (self.periods, states))
        uses = self.config.repeats // self.config.groups
        fold = lambda leaf: leaf.reshape(-1, uses, *leaf.shape[1:])  # noqa: E731
        unfold = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731

        def group(carry, period_and_states):
            period, states = period_and_states
            return jax.lax.scan(lambda carry, state: body(carry, (period, state)), carry, states, length=uses)

        carry, after = jax.lax.scan(group, carry, (self.periods, jax.tree.map(fold, states)))
        return carry, jax.tree.map(unfold, after)


def _one(stack: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stack)
