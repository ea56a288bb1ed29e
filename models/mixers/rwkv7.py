"""RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456, section 4): its time mixing and its channel mixing.

The initialisation is that of the authors' modules (RWKV-LM, RWKV-v7/train_temp/src/model.py).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.wkv7 import wkv7
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError, check_divides
from phyla.models.layers import Layer, Linear, by_head, each_apart
from phyla.models.token_shift import shift
from phyla.models.weights import constant, orthogonal, parameter, uniform

FASTEST = -0.6065306597126334  # log of the fastest decay, -exp(-1/2)
HEAD_NORM_EPSILON = 64e-5


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(LayerConfig):
    """The time mixing of RWKV-7: a matrix state for each head, written and erased at keys."""

    head_dim: int = 64
    """K, keys and values of a head."""
    heads: int | None = None
    """H; None: width / head_dim, which it must divide. Blocks that share a value have as many."""
    value_residual: bool = True
    """Mix the values with those of the first RWKV-7 block; False for that block itself."""
    decay_rank: int | None = None
    """Rank of the decay's matrix; None: 2.5 √width, to a multiple of 32."""
    rate_rank: int | None = None
    """Rank of the in-context learning rate's matrix; None: 2.5 √width, to a multiple of 32."""
    value_rank: int | None = None
    """Rank of the value residual's matrix; None: 1.7 √width, to a multiple of 32."""
    gate_rank: int | None = None
    """Rank of the output gate's matrix; None: 5 √width, to a multiple of 32."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "RWKV7":
        """See `LayerConfig.build`."""
        if self.heads is None:
            check_divides("rwkv7.head_dim", self.head_dim, "model.width", model.width)
        for name in ("head_dim", "heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"rwkv7.{name} must be at least 1, not {value}")
        for name, rank in self.ranks(model).items():
            if rank < 1:
                raise UserError(f"rwkv7.{name}_rank must be at least 1, not {rank}")
        return RWKV7(self, model, rngs, layer)

    def inner(self, model: ModelConfig) -> int:
        """The width of all heads."""
        return model.width if self.heads is None else self.heads * self.head_dim

    def ranks(self, model: ModelConfig) -> dict[str, int]:
        """The four ranks."""
        given = {"decay": self.decay_rank, "rate": self.rate_rank, "value": self.value_rank, "gate": self.gate_rank}
        published = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}

        def default(factor: float) -> int:
            return max(32, round(factor * model.width**0.5 / 32) * 32)

        return {name: default(published[name]) if rank is None else rank for name, rank in given.items()}

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: 9 for each number of the state."""
        return 9 * self.inner(model) * self.head_dim

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.inner(model) // self.head_dim


class RWKV7State(NamedTuple):
    """What a time mixing remembers, in float32."""

    last: jax.Array  # [B, D], its last input
    wkv: jax.Array  # [B, H, K, K]
    cursor: Cursor


class LowRank(nnx.Module):
    """up(activation(down(x))): the same for every token at first."""

    def __init__(self, width: int, rank: int, inner: int, rngs: nnx.Rngs):
        linear = functools.partial(Linear, rngs=rngs, precise="of low rank, and it decides on the decay or a rate")
        self.down = linear((width, rank), ("embed", "rank"), init=constant(0.0))
        self.up = linear((rank, inner), ("rank", "inner"), init=orthogonal(0.1 * max(1, rank / inner) ** 0.5))

    def __call__(self, x: jax.Array, activation: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """[..., D] -> float32 [..., inner]."""
        low = self.down(x)
        return self.up(low if activation is None else activation(low)).astype(jnp.float32)


class RWKV7(Layer):
    """See `RWKV7Config`."""

    memory: ClassVar = {"wkv": (-2,)}  # a scale for each key: what shares it fades alike

    shares_value: ClassVar[bool] = True

    def __init__(self, config: RWKV7Config, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.config = config
        self.width, self.inner = D, inner = model.width, config.inner(model)
        K = config.head_dim
        ranks = config.ranks(model)
        depth = layer / max(model.layers - 1, 1)  # 0 to 1
        ahead = 1 - layer / model.layers  # 1 to almost 0
        linear = jnp.arange(inner) / max(inner - 1, 1)
        zigzag = (jnp.arange(inner) % K - (K - 1) / 2) / max((K - 1) / 2, 0.5)
        zigzag = zigzag * jnp.abs(zigzag)

        def vector(init: jax.Array | float, axis: str = "inner", learning_rate: float = 1.0) -> nnx.Param:
            return parameter(
                lambda key, shape: jnp.broadcast_to(jnp.asarray(init), shape),
                (D if axis == "norm" else inner,),
                (axis,),
                rngs,
                learning_rate=learning_rate,
            )

        for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            setattr(self, f"x_{name}", vector(1 - (jnp.arange(D) / D) ** (power * ahead), axis="norm"))
        bound = 0.5 * D**-0.5
        self.receptance = Linear((D, inner), ("embed", "inner"), rngs, init=uniform(bound))
        self.key = Linear((D, inner), ("embed", "inner"), rngs, init=uniform(0.1 * bound))
        self.value = Linear((D, inner), ("embed", "inner"), rngs, init=uniform(bound))
        self.output = Linear((inner, D), ("inner", "embed"), rngs, init=constant(0.0))
        self.w0 = vector(-5.5 + 6 * linear ** (1 + depth**0.3) + 2.5 * zigzag, learning_rate=2.0)
        self.w = LowRank(D, ranks["decay"], inner, rngs)
        self.a0 = vector(-0.19 + 0.3 * zigzag + 0.4 * (linear - 0.5))
        self.a = LowRank(D, ranks["rate"], inner, rngs)
        self.g = LowRank(D, ranks["gate"], inner, rngs)
        if config.value_residual:
            self.v0 = vector(0.73 - 0.4 * (linear - 0.5))
            self.v = LowRank(D, ranks["value"], inner, rngs)
        self.k_k = vector(0.71 - 0.1 * (linear - 0.5))
        self.k_a = vector(1.02)
        self.r_k = vector(-0.04)
        self.norm_scale = vector(((1 + layer) / model.layers) ** 0.7)
        self.norm_bias = vector(0.0)

    def initial_state(self, batch: int, length: int) -> RWKV7State:
        """Zeros; the same size for any length."""
        D, K = self.width, self.config.head_dim
        return RWKV7State(jnp.zeros((batch, D)), jnp.zeros((batch, self.inner // K, K, K)), start(batch))

    def __call__(
        self,
        x: jax.Array,
        state: RWKV7State | None = None,
        segment_ids: jax.Array | None = None,
        value: jax.Array | None = None,
    ) -> tuple[jax.Array, RWKV7State | None, jax.Array]:
        """[B, T, D] -> [B, T, D], the state after the last token (None if None was given), and the shared value.

        Raises UserError for a value residual without a value: no RWKV-7 block comes before this one.
        """
        B, T, _ = x.shape
        last = wkv = None
        if state is not None:
            last, wkv = carry(state.cursor, segment_ids, (state.last, state.wkv))
        before, last = shift(x, last, segment_ids)
        r, log_w, k, erased, added = self._given(x, before)
        xv = self._mixed(x, before, "v")
        v, gate = self.value(xv), self.g(self._mixed(x, before, "g"), jax.nn.sigmoid)
        if self.config.value_residual:
            if value is None:
                raise UserError("rwkv7.value_residual must be false in the first rwkv7 block (give it in model.prefix)")
            v = v + (value - v) * jax.nn.sigmoid(self.v0[...] + self.v(xv)).astype(v.dtype)
        y_BxTxHxK, wkv = wkv7(
            r,
            log_w,
            k,
            self._heads(v.astype(jnp.float32)),
            erased,
            added,
            initial_state=wkv,
            segment_ids=segment_ids,
        )
        bonus_BxTxHxK = jnp.sum(r * k * self._heads(self.r_k[...]), -1, keepdims=True) * self._heads(v)
        y_BxTxI = _normalised(y_BxTxHxK).reshape(B, T, self.inner) * self.norm_scale[...] + self.norm_bias[...]
        y_BxTxD = self.output(((y_BxTxI + bonus_BxTxHxK.reshape(B, T, self.inner)) * gate).astype(x.dtype))
        value = v if value is None else value
        if state is None:
            return y_BxTxD, None, value
        return y_BxTxD, RWKV7State(last, wkv, advance(state.cursor, segment_ids, B, T)[2]), value

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`: the norm that follows and the bonus after it are not in it."""
        r, log_w, k, erased, added = self._given(x, shift(x, None, segment_ids)[0])
        values = each_apart(x, r.shape[2])
        return by_head(wkv7(r, log_w, k, values, erased, added, segment_ids=segment_ids)[0])

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

    def _mixed(self, x: jax.Array, before: jax.Array, name: str) -> jax.Array:
        return x + (before - x) * getattr(self, f"x_{name}")[...].astype(x.dtype)

    def _given(self, x: jax.Array, before: jax.Array) -> tuple[jax.Array, ...]:
        """r, log_w, k, a and b as `wkv7` takes them."""
        r, k = self.receptance(self._mixed(x, before, "r")), self.key(self._mixed(x, before, "k")).astype(jnp.float32)
        log_w = FASTEST * jax.nn.sigmoid(self.w0[...] + self.w(self._mixed(x, before, "w"), jnp.tanh))
        rate = jax.nn.sigmoid(self.a0[...] + self.a(self._mixed(x, before, "a")))
        kappa = _unit(self._heads(k * self.k_k[...]))
        k = k * (1 + (rate - 1) * self.k_a[...])
        return self._heads(r), self._heads(log_w), self._heads(k), -kappa, kappa * self._heads(rate)


@dataclass(frozen=True, kw_only=True)
class RWKV7ChannelConfig(LayerConfig):
    """The channel mixing of RWKV-7: value(relu(key(x))²), x mixed with the token before it."""

    expand: float = 4.0
    """Hidden width over the model's width."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "RWKV7Channel":
        """See `LayerConfig.build`."""
        if self.hidden(model) < 1:
            raise UserError(f"rwkv7_channel.expand must give at least one hidden channel, not {self.expand}")
        return RWKV7Channel(self, model, rngs, layer)

    def hidden(self, model: ModelConfig) -> int:
        """The hidden width."""
        return round(self.expand * model.width)


class RWKV7ChannelState(NamedTuple):
    """What a channel mixing remembers."""

    last: jax.Array  # [B, D], its last input, float32
    cursor: Cursor


class RWKV7Channel(Layer):
    """See `RWKV7ChannelConfig`."""

    def __init__(self, config: RWKV7ChannelConfig, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.width = D = model.width
        hidden = config.hidden(model)
        mix = 1 - (jnp.arange(D) / D) ** ((1 - layer / model.layers) ** 4)
        self.x_k = parameter(lambda key, shape: mix, (D,), ("norm",), rngs)
        self.key = Linear((D, hidden), ("embed", "mlp"), rngs, init=uniform(0.5 * D**-0.5))
        self.value = Linear((hidden, D), ("mlp", "embed"), rngs, init=constant(0.0))

    def initial_state(self, batch: int, length: int) -> RWKV7ChannelState:
        """Zeros; the same size for any length."""
        return RWKV7ChannelState(jnp.zeros((batch, self.width)), start(batch))

    def __call__(
        self, x: jax.Array, state: RWKV7ChannelState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, RWKV7ChannelState | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        last = None if state is None else carry(state.cursor, segment_ids, state.last)
        before, last = shift(x, last, segment_ids)
        y = self.value(jnp.square(jax.nn.relu(self.key(x + (before - x) * self.x_k[...].astype(x.dtype)))))
        if state is None:
            return y, None
        return y, RWKV7ChannelState(last, advance(state.cursor, segment_ids, *x.shape[:2])[2])


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last dimension, with |x| at least 1e-12."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def _normalised(x: jax.Array) -> jax.Array:
    """(x - mean) / std over the last dimension."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + HEAD_NORM_EPSILON)
