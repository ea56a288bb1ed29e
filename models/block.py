"""A block of a model, and one pass over the blocks of its pattern."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.held import alike, empty
from phyla.models.layers import build_norm


class Block(nnx.Module):
    """One mixer and at most one channel mixer, each normalised and added to the residual stream."""

    def __init__(self, config: BlockConfig, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.dtype = jnp.dtype(model.dtype)
        self.norm_first = model.norm_position == "pre"
        self.mixer_norm = build_norm(model, rngs)
        self.mixer = config.mixer.build(model, rngs, layer)
        self.has_channel = config.channel is not None
        if config.channel is not None:
            self.channel_norm = build_norm(model, rngs)
            self.channel = config.channel.build(model, rngs, layer)

    def initial_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """Of the mixer and of the channel mixer."""
        channel = self.channel.initial_state(batch, length) if self.has_channel else None
        return self.mixer.initial_state(batch, length), channel

    def in_few_bits(self, state: tuple[Any, Any]) -> tuple[Any, Any]:
        """An empty state with what its mixer holds as codes; it may be stacked. Channel mixers remember little."""
        mixer, channel = state
        return empty(mixer, {name: self.mixer.memory[name] for name in self.mixer.held}), channel

    def with_room(self, state: tuple[Any, Any], length: int) -> tuple[Any, Any]:
        """See `Layer.with_room`."""
        mixer, channel = state
        channel = self.channel.with_room(channel, length) if self.has_channel else channel
        return self.mixer.with_room(mixer, length), channel

    def __call__(
        self, x: jax.Array, value: jax.Array | None, state: Any, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, Any, Any]:
        """The residual stream, float32 [B, T, D], and the shared value; both again, the block's state, its routing."""
        mixer_state, channel_state = before = (None, None) if state is None else state
        routing = None
        inputs = self.mixer_input(x), mixer_state, segment_ids
        if self.mixer.shares_value:
            y, mixer_state, value = self.mixer(*inputs, value)
        else:
            y, mixer_state = self.mixer(*inputs)
        x = self._add(x, y, self.mixer_norm)
        if self.has_channel:
            inputs = self._input(x, self.channel_norm), channel_state, segment_ids
            if self.channel.routes:
                y, channel_state, routing = self.channel(*inputs)
            else:
                y, channel_state = self.channel(*inputs)
            x = self._add(x, y, self.channel_norm)
        return x, value, alike((mixer_state, channel_state), before), routing

    def mixer_input(self, x: jax.Array) -> jax.Array:
        """What the mixer sees of the residual stream before the block, [B, T, D] in the compute dtype."""
        return self._input(x, self.mixer_norm)

    def _input(self, x: jax.Array, norm: Any) -> jax.Array:
        return (norm(x) if self.norm_first else x).astype(self.dtype)

    def _add(self, x: jax.Array, y: jax.Array, norm: Any) -> jax.Array:
        return x + y if self.norm_first else norm(x + y)


class Period(nnx.Module):
    """One pass over the pattern, of which the first block is the model's block number `layer`."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.blocks = nnx.List([Block(block, model, rngs, layer + i) for i, block in enumerate(model.pattern)])

    def __call__(
        self, x: jax.Array, value: jax.Array | None, states: tuple | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, tuple, tuple, tuple]:
        """See `Block`; a state and a residual stream for each block, a routing for each mixture of experts."""
        after, routings, streams, first = [], [], [], value
        for i, block in enumerate(self.blocks):
            state = None if states is None else states[i]
            x, value, state, routing = block(x, value if first is not None else None, state, segment_ids)
            after.append(state)
            routings += [] if routing is None else [routing]
            streams.append(x)
        return x, first, tuple(after), tuple(routings), tuple(streams)
