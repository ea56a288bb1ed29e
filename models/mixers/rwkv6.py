"""RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892): its time mixing; its channel mixing is RWKV-4's.

The initialisation and the learning rates are those of the authors' model (RWKV-LM, RWKV-v5/src/model.py, x060).
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.wkv6 import wkv6
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError, check_divides
from phyla.models.layers import Layer, Linear, by_head, each_apart
from phyla.models.mixers.rwkv4 import RWKV4Channel, RWKV4ChannelConfig, depths, vector
from phyla.models.token_shift import shift
from phyla.models.weights import constant, orthogonal, uniform

HEAD_NORM_EPSILON = 64e-5
MIXED = "wkvrg"
"""What the token shift mixes, each with weights of its own: decay, key, value, receptance, gate."""


@dataclass(frozen=True, kw_only=True)
class RWKV6Config(LayerConfig):
    """The time mixing of RWKV-6: linear attention with a decay for each token and channel."""

    head_dim: int = 64
    """K, keys and values of a head."""
    heads: int | None = None
    """H; None: width / head_dim, which it must divide."""
    mix_rank: int = 32
    """Rank of what a token adds to the weights of its token shift."""
    decay_rank: int = 64
    """Rank of what a token adds to its decay."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "RWKV6":
        """See `LayerConfig.build`."""
        if self.heads is None:
            check_divides("rwkv6.head_dim", self.head_dim, "model.width", model.width)
        for name in ("head_dim", "heads", "mix_rank", "decay_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"rwkv6.{name} must be at least 1, not {value}")
        return RWKV6(self, model, rngs, layer)

    def inner(self, model: ModelConfig) -> int:
        """The width of all heads."""
        return model.width if self.heads is None else self.heads * self.head_dim

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: 5 for each number of the state."""
        return 5 * self.inner(model) * self.head_dim

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.inner(model) // self.head_dim


@dataclass(frozen=True, kw_only=True)
class RWKV6ChannelConfig(RWKV4ChannelConfig):
    """The channel mixing of RWKV-6: that of RWKV-4, not as wide."""

    expand: float = 3.5
    """Hidden width over the model's width."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> RWKV4Channel:
        """See `LayerConfig.build`."""
        super().build(model, rngs, layer)
        return RWKV4Channel(self.hidden(model), 1.0, model, rngs, layer)


class RWKV6State(NamedTuple):
    """What a time mixing remembers, in float32."""

    last: jax.Array  # [B, D], its last input
    wkv: jax.Array  # [B, H, K, K]
    cursor: Cursor


class RWKV6(Layer):
    """See `RWKV6Config`."""

    memory: ClassVar = {"wkv": (-1,)}  # a scale for each key: what shares it fades alike

    def __init__(self, config: RWKV6Config, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.width, self.head_dim = D, _ = model.width, config.head_dim
        self.inner = inner = config.inner(model)
        depth, ahead = depths(model, layer)
        channel, ramp = jnp.arange(inner) / max(inner - 1, 1), jnp.arange(D) / D
        # How much of the token before is in each; `mix_x` in what decides how much more.
        shares = dict.fromkeys("xwk", 1 - ramp**ahead)
        shares |= {"v": 1 - ramp**ahead - 0.3 * depth} | dict.fromkeys("rg", 1 - ramp ** (0.5 * ahead))
        for name, share in shares.items():
            setattr(self, f"mix_{name}", vector(share, "norm", rngs))
        why = "of low rank, and it decides on the mixing or the decay"
        down = functools.partial(Linear, rngs=rngs, init=constant(0.0), precise=why)
        up = functools.partial(Linear, rngs=rngs, init=uniform(0.01), precise=why)
        self.mix_down = down((D, len(MIXED) * config.mix_rank), ("embed", "rank"))
        self.mix_up = nnx.List([up((config.mix_rank, D), ("rank", "embed")) for _ in MIXED])
        self.time_decay = vector(-6 + 5 * channel ** (0.7 + 1.3 * depth), "inner", rngs, learning_rate=2.0)
        self.decay_down = down((D, config.decay_rank), ("embed", "rank"))
        self.decay_up = up((config.decay_rank, inner), ("rank", "inner"))
        zigzag = 0.1 * ((jnp.arange(inner) + 1) % 3 - 1)
        self.time_first = vector(depth * (1 - channel) + zigzag, "inner", rngs)
        self.receptance = Linear((D, inner), ("embed", "inner"), rngs, init=orthogonal(1.0))
        self.key = Linear((D, inner), ("embed", "inner"), rngs, init=orthogonal(0.1))
        self.value = Linear((D, inner), ("embed", "inner"), rngs, init=orthogonal(1.0))
        self.gate = Linear((D, inner), ("embed", "inner"), rngs, init=orthogonal(0.1))
        self.output = Linear((inner, D), ("inner", "embed"), rngs, init=constant(0.0))
        self.norm_scale = vector(jnp.full(inner, ((1 + layer) / model.layers) ** 0.7), "inner", rngs)
        self.norm_bias = vector(jnp.zeros(inner), "inner", rngs)

    def initial_state(self, batch: int, length: int) -> RWKV6State:
        """Zeros; the same size for any length."""
        D, K = self.width, self.head_dim
        return RWKV6State(jnp.zeros((batch, D)), jnp.zeros((batch, self.inner // K, K, K)), start(batch))

    def __call__(
        self, x: jax.Array, state: RWKV6State | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, RWKV6State | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        B, T, _ = x.shape
        last = wkv = None
        if state is not None:
            last, wkv = carry(state.cursor, segment_ids, (state.last, state.wkv))
        before, last = shift(x, last, segment_ids)
        r, w, k, v, gate = self._given(x, before)
        y_BxTxHxK, wkv = wkv6(r, w, k, v, self._first(), initial_state=wkv, segment_ids=segment_ids)
        y_BxTxI = _normalised(y_BxTxHxK).reshape(B, T, self.inner) * self.norm_scale[...] + self.norm_bias[...]
        y_BxTxD = self.output((y_BxTxI * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype))
        if state is None:
            return y_BxTxD, None
        return y_BxTxD, RWKV6State(last, wkv, advance(state.cursor, segment_ids, B, T)[2])

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`: the norm that follows is not in it."""
        r, w, k, v, _ = self._given(x, shift(x, None, segment_ids)[0])
        return by_head(wkv6(r, w, k, each_apart(x, v.shape[2]), self._first(), segment_ids=segment_ids)[0])

    def _first(self) -> jax.Array:
        return self.time_first[...].reshape(-1, self.head_dim)

    def _given(self, x: jax.Array, before: jax.Array) -> tuple[jax.Array, ...]:
        """r, w, k and v as `wkv6` takes them, and the output gate before its activation."""
        change = before - x

        def share(name: str) -> jax.Array:
            return getattr(self, f"mix_{name}")[...].astype(x.dtype)

        def heads(x_BxTxI: jax.Array) -> jax.Array:
            return x_BxTxI.reshape(*x.shape[:2], -1, self.head_dim)

        low = jnp.split(jnp.tanh(self.mix_down(x + change * share("x"))), len(MIXED), axis=-1)
        more = (up(part) for up, part in zip(self.mix_up, low, strict=True))
        xw, xk, xv, xr, xg = (x + change * (share(name) + m) for name, m in zip(MIXED, more, strict=True))
        decay = self.time_decay[...] + self.decay_up(jnp.tanh(self.decay_down(xw))).astype(jnp.float32)
        w = -jnp.exp(jnp.minimum(decay, 60.0))  # exp(-exp(60)) is 0
        return heads(self.receptance(xr)), heads(w), heads(self.key(xk)), heads(self.value(xv)), self.gate(xg)


def _normalised(x: jax.Array) -> jax.Array:
    """(x - mean) / std over the last dimension, in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + HEAD_NORM_EPSILON)
