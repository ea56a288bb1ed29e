"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048, section 3): its time mixing and its channel mixing.

The initialisation and the learning rates are those of the authors' model (RWKV-LM, RWKV-v4neo/src/model.py).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.wkv4 import wkv4
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError
from phyla.models.layers import Layer, Linear
from phyla.models.token_shift import shift
from phyla.models.weights import constant, orthogonal, parameter


@dataclass(frozen=True, kw_only=True)
class RWKV4Config(LayerConfig):
    """The time mixing of RWKV-4: an average of values, weighted by keys that fade, channel by channel."""

    expand: float = 1.0
    """Inner width over the model's width."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "RWKV4":
        """See `LayerConfig.build`."""
        if self.inner(model) < 1:
            raise UserError(f"rwkv4.expand must give at least one inner channel, not {self.expand}")
        return RWKV4(self, model, rngs, layer)

    def inner(self, model: ModelConfig) -> int:
        """The inner width."""
        return round(self.expand * model.width)

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: two averages of one more value, 7 operations each (and two exps)."""
        return 14 * self.inner(model)


class RWKV4State(NamedTuple):
    """What a time mixing remembers, in float32."""

    last: jax.Array  # [B, D], its last input
    wkv: tuple[jax.Array, jax.Array, jax.Array]  # aa, bb, pp of `wkv4`, [B, inner] each
    cursor: Cursor


class RWKV4(Layer):
    """See `RWKV4Config`."""

    memory: ClassVar = {"wkv.0": (-1,), "wkv.1": (-1,)}  # averages, and ones: see `averages`

    def __init__(self, config: RWKV4Config, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.width, self.inner = D, inner = model.width, config.inner(model)
        depth, ahead = depths(model, layer)
        channel = jnp.arange(inner)
        decay = -5 + 8 * (channel / max(inner - 1, 1)) ** (0.7 + 1.3 * depth)
        self.time_decay = vector(decay, "inner", rngs, learning_rate=2.0)
        first = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
        self.time_first = vector(first, "inner", rngs, learning_rate=3.0)
        ramp = jnp.arange(D) / D
        self.mix_r = vector(ramp ** (0.5 * ahead), "norm", rngs)
        self.mix_k = vector(ramp**ahead, "norm", rngs)
        self.mix_v = vector(ramp**ahead + 0.3 * depth, "norm", rngs)
        self.receptance = Linear((D, inner), ("embed", "inner"), rngs, init=constant(0.0))
        self.key = Linear((D, inner), ("embed", "inner"), rngs, init=constant(0.0))
        self.value = Linear((D, inner), ("embed", "inner"), rngs, init=orthogonal(max(1, inner / D) ** 0.5))
        self.output = Linear((inner, D), ("inner", "embed"), rngs, init=constant(0.0))

    def initial_state(self, batch: int, length: int) -> RWKV4State:
        """Zeros; the same size for any length."""
        empty = jnp.zeros((batch, self.inner))
        return RWKV4State(jnp.zeros((batch, self.width)), (empty, empty, empty), start(batch))

    def __call__(
        self, x: jax.Array, state: RWKV4State | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, RWKV4State | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        last = wkv = None
        if state is not None:
            last, wkv = carry(state.cursor, segment_ids, (state.last, state.wkv))
        before, last = shift(x, last, segment_ids)
        r = jax.nn.sigmoid(self.receptance(mixed(x, before, self.mix_r)).astype(jnp.float32))
        y, wkv = wkv4(
            self.key(mixed(x, before, self.mix_k)),
            self.value(mixed(x, before, self.mix_v)),
            -jnp.exp(self.time_decay[...]),
            self.time_first[...],
            initial_state=wkv,
            segment_ids=segment_ids,
        )
        y = self.output((r * y).astype(x.dtype))
        if state is None:
            return y, None
        wkv = averages(*wkv) if self.held else wkv
        return y, RWKV4State(last, wkv, advance(state.cursor, segment_ids, *x.shape[:2])[2])


def averages(total: jax.Array, weight: jax.Array, exponent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same state with its totals, over weights of any size, divided by them: averages, ones, and where they went.

    8 bits do for averages of values, also where some channels have seen much and others little; nothing seen stays so.
    """
    seen = weight > 0
    divisor = jnp.where(seen, weight, 1.0)
    return total / divisor, seen.astype(jnp.float32), exponent + jnp.log(divisor)


@dataclass(frozen=True, kw_only=True)
class RWKV4ChannelConfig(LayerConfig):
    """The channel mixing of RWKV-4: sigmoid(receptance(x)) value(relu(key(x))²), x mixed with the token before it."""

    expand: float = 4.0
    """Hidden width over the model's width."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "RWKV4Channel":
        """See `LayerConfig.build`."""
        hidden = self.hidden(model)
        if hidden < 1:
            raise UserError(f"channel.expand must give at least one hidden channel, not {self.expand}")
        return RWKV4Channel(hidden, max(1, hidden / model.width) ** 0.5, model, rngs, layer)

    def hidden(self, model: ModelConfig) -> int:
        """The hidden width."""
        return round(self.expand * model.width)


class ChannelState(NamedTuple):
    """What a channel mixing remembers."""

    last: jax.Array  # [B, D], its last input, float32
    cursor: Cursor


class RWKV4Channel(Layer):
    """See `RWKV4ChannelConfig`. `gain`: the scale of the orthogonal keys."""

    def __init__(self, hidden: int, gain: float, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.width = D = model.width
        ramp = (jnp.arange(D) / D) ** depths(model, layer)[1]
        self.mix_r = vector(ramp, "norm", rngs)
        self.mix_k = vector(ramp, "norm", rngs)
        # Its axes are not ("embed", "embed"): a mesh axis divides one dimension of an array.
        self.receptance = Linear((D, D), ("embed", "inner"), rngs, init=constant(0.0))
        self.key = Linear((D, hidden), ("embed", "mlp"), rngs, init=orthogonal(gain))
        self.value = Linear((hidden, D), ("mlp", "embed"), rngs, init=constant(0.0))

    def initial_state(self, batch: int, length: int) -> ChannelState:
        """Zeros; the same size for any length."""
        return ChannelState(jnp.zeros((batch, self.width)), start(batch))

    def __call__(
        self, x: jax.Array, state: ChannelState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, ChannelState | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        last = None if state is None else carry(state.cursor, segment_ids, state.last)
        before, last = shift(x, last, segment_ids)
        r = jax.nn.sigmoid(self.receptance(mixed(x, before, self.mix_r)).astype(jnp.float32))
        k = jnp.square(jax.nn.relu(self.key(mixed(x, before, self.mix_k))))
        y = (r * self.value(k)).astype(x.dtype)
        if state is None:
            return y, None
        return y, ChannelState(last, advance(state.cursor, segment_ids, *x.shape[:2])[2])


def mixed(x: jax.Array, before: jax.Array, mix: nnx.Param) -> jax.Array:
    """mix x + (1 - mix) before, channel by channel, in the dtype of x."""
    return before + (x - before) * mix[...].astype(x.dtype)


def depths(model: ModelConfig, layer: jax.Array | int) -> tuple[jax.Array | float, jax.Array | float]:
    """From 0 in the first block to 1 in the last, and from 1 to almost 0."""
    return layer / max(model.layers - 1, 1), 1 - layer / model.layers


def vector(values: jax.Array, axis: str, rngs: nnx.Rngs, learning_rate: float = 1.0) -> nnx.Param:
    """A parameter that begins as these values (a copy: two parameters do not share an array)."""
    return parameter(lambda key, shape: jnp.array(values), values.shape, (axis,), rngs, learning_rate=learning_rate)
