"""The language model: embedding, a repeated pattern of blocks, a norm and a head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, start
from phyla.models.errors import UserError
from phyla.models.layers import Embedding, Linear, build_norm


class ModelState(NamedTuple):
    """What the model remembers of the tokens so far."""

    blocks: tuple[Any, ...]  # one mixer state for each block of the pattern, stacked over its repeats
    cursor: Cursor


class Block(nnx.Module):
    """One mixer and at most one channel mixer, each normalised before and added to the residual stream."""

    def __init__(self, config: BlockConfig, model: ModelConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(model.dtype)
        self.mixer_norm = build_norm(model, rngs)
        self.mixer = config.mixer.build(model, rngs)
        self.has_channel = config.channel is not None
        if config.channel is not None:
            self.channel_norm = build_norm(model, rngs)
            self.channel = config.channel.build(model, rngs)

    def __call__(self, x: jax.Array, state: Any, segment_ids: jax.Array | None) -> tuple[jax.Array, Any]:
        """float32 [B, T, D] -> float32 [B, T, D] and the mixer's state."""
        y, state = self.mixer(self.mixer_norm(x).astype(self.dtype), state, segment_ids)
        x = x + y
        if self.has_channel:
            x = x + self.channel(self.channel_norm(x).astype(self.dtype))
        return x, state


class Period(nnx.Module):
    """One pass over the pattern."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(block, model, rngs) for block in model.pattern])

    def __call__(self, x: jax.Array, states: tuple | None, segment_ids: jax.Array | None) -> tuple[jax.Array, tuple]:
        """See `Block`; one state for each block."""
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i], segment_ids)
            after.append(state)
        return x, tuple(after)


class LanguageModel(nnx.Module):
    """A model built from its configuration.

    The blocks are stacked over the pattern's repeats and scanned, so that compile time does not grow with depth.

    Raises UserError, naming the field, where the configuration contradicts itself.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set: the tokenizer decides it")
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        self.embedding = Embedding(config.vocab_size, config.width, rngs)
        if config.learned_positions:
            axes = ("positions", "embed")
            self.position_embedding = Embedding(config.learned_positions, config.width, rngs, axes=axes)
        keys = jax.random.split(rngs.params(), config.repeats)
        self.periods = jax.vmap(lambda key: Period(config, nnx.Rngs(params=key)))(keys)
        for _, variable in nnx.to_flat_state(nnx.state(self.periods)):
            variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
        self.norm = build_norm(config, rngs)
        if not config.tie_embeddings:
            self.head = Linear((config.width, config.vocab_size), ("embed", "vocab"), rngs)

    def initial_state(self, batch: int, length: int) -> ModelState:
        """The state before the first token, with room for `length` tokens where a mixer keeps them all."""

        def stacked(block: Block) -> Any:
            state = block.mixer.initial_state(batch, length)
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.config.repeats, *leaf.shape)), state)

        return ModelState(tuple(stacked(block) for block in self.periods.blocks), start(batch))

    def __call__(
        self, tokens: jax.Array, state: ModelState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Hidden vectors, normalised, for `logits`; and the state after the last token (None if None was given).

        Args:
            tokens: integers [B, T].
            state: from `initial_state` or an earlier call; None for a sequence that is given whole.
            segment_ids: [B, T], a number for each document (0: padding); None: one document, or the state's goes on.

        Returns:
            hidden [B, T, D] in the compute dtype, and the `ModelState` (None if None was given).

        Raises UserError for more tokens than learned positions.
        """
        config = self.config
        if config.learned_positions and tokens.shape[1] > config.learned_positions:
            raise UserError(f"{tokens.shape[1]} tokens do not fit model.learned_positions {config.learned_positions}")
        x_BxTxD = self.embedding(tokens)
        _, positions_BxT, cursor = advance(state and state.cursor, segment_ids, *tokens.shape)
        if config.learned_positions:
            x_BxTxD += self.position_embedding(positions_BxT)

        def body(x, period_and_state):
            period, block_states = period_and_state
            return period(x, block_states, segment_ids)

        if config.remat == "full":
            body = jax.checkpoint(body)
        elif config.remat == "dots":
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        x_BxTxD, states = jax.lax.scan(body, x_BxTxD, (self.periods, state and state.blocks))
        hidden_BxTxD = self.norm(x_BxTxD).astype(self.dtype)
        return hidden_BxTxD, None if state is None else ModelState(states, cursor)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        if self.config.tie_embeddings:
            return self.embedding.logits(hidden)
        return self.head(hidden).astype(jnp.float32)
