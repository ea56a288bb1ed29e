"""Mamba-2: a gated, convolved state space with one decay a head (Dao and Gu 2024, section 7)."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.causal_conv import causal_conv
from phyla.kernels.ssd import ssd
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError, check_divides
from phyla.models.layers import Layer, Linear, by_head, each_apart
from phyla.models.mixers.mamba import initial_dt_bias
from phyla.models.weights import constant, fan_in, parameter, taps


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(LayerConfig):
    """The state space of Mamba-2."""

    expand: float = 2.0
    """Inner width over the model's width."""
    head_dim: int = 64
    """P, channels a head; it divides the inner width."""
    state: int = 128
    """N, the state's size per inner channel."""
    groups: int = 1
    """G, groups of heads that share B and C, and that are normalised together before the output projection."""
    conv: int = 4
    """Width of the causal convolution."""
    dt_limit: tuple[float, ...] | None = None
    """Least and greatest step size; None: no limit."""
    bias: bool = False
    """Biases on the input and output projections."""
    conv_bias: bool = True
    """Bias on the convolution."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "Mamba2":
        """See `LayerConfig.build`."""
        for name in ("head_dim", "state", "groups", "conv"):
            if getattr(self, name) < 1:
                raise UserError(f"mamba2.{name} must be at least 1, not {getattr(self, name)}")
        inner = self.inner(model)
        if inner < 1:
            raise UserError(f"mamba2.expand must give at least one inner channel, not {self.expand}")
        check_divides("mamba2.head_dim", self.head_dim, "the inner width", inner)
        check_divides("mamba2.groups", self.groups, "the number of heads", self.heads(model))
        if self.dt_limit is not None and not (len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] <= self.dt_limit[1]):
            raise UserError(f"mamba2.dt_limit must be two step sizes, least and greatest, not {self.dt_limit}")
        return Mamba2(self, model, rngs)

    def inner(self, model: ModelConfig) -> int:
        """The inner width."""
        return round(self.expand * model.width)

    def heads(self, model: ModelConfig) -> int:
        """H."""
        return self.inner(model) // self.head_dim

    def convolved(self, model: ModelConfig) -> int:
        """The channels that pass through the convolution: x, B and C."""
        return self.inner(model) + 2 * self.groups * self.state

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: 2 for each tap and 5 for each state, as a recurrence."""
        return 2 * self.conv * self.convolved(model) + 5 * self.inner(model) * self.state

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.heads(model)


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers, in float32."""

    conv: jax.Array  # [B, conv - 1, inner + 2 G N]
    ssm: jax.Array  # [B, H, P, N]
    cursor: Cursor


class Mamba2(Layer):
    """See `Mamba2Config`."""

    memory: ClassVar = {"ssm": (-1,)}  # a scale for each channel

    def __init__(self, config: Mamba2Config, model: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.inner, self.heads, self.convolved = config.inner(model), config.heads(model), config.convolved(model)
        projected = self.inner + self.convolved + self.heads  # z; x, B and C; dt
        self.in_proj = Linear((model.width, projected), ("embed", "inner"), rngs, bias=config.bias)
        self.conv_weight = parameter(
            taps(config.conv), (config.conv, self.convolved), ("conv", "inner"), rngs, weight_decay=True
        )
        self.conv_bias = parameter(taps(config.conv), (self.convolved,), ("inner",), rngs) if config.conv_bias else None
        self.dt_bias = parameter(initial_dt_bias, (self.heads,), ("heads",), rngs)
        a_log = lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1, maxval=16))  # noqa: E731
        self.A_log = parameter(a_log, (self.heads,), ("heads",), rngs)
        self.D = parameter(constant(1.0), (self.heads,), ("heads",), rngs)
        self.norm = GatedRMSNorm(self.inner, config.groups, rngs, epsilon=model.norm_epsilon)
        out = fan_in(1 / math.sqrt(model.layers))
        self.out_proj = Linear((self.inner, model.width), ("inner", "embed"), rngs, bias=config.bias, init=out)

    def initial_state(self, batch: int, length: int) -> Mamba2State:
        """Zeros; the same size for any length."""
        return Mamba2State(
            conv=jnp.zeros((batch, self.config.conv - 1, self.convolved)),
            ssm=jnp.zeros((batch, self.heads, self.config.head_dim, self.config.state)),
            cursor=start(batch),
        )

    def __call__(
        self, x: jax.Array, state: Mamba2State | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba2State | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        B, T, _ = x.shape
        conv_state = ssm_state = None
        if state is not None:
            conv_state, ssm_state = carry(state.cursor, segment_ids, (state.conv, state.ssm))
        x_, *given, z, conv_state = self._given(x, conv_state, segment_ids)
        x_BxTxHxP = x_.reshape(B, T, self.heads, -1)
        y_BxTxHxP, ssm_state = ssd(x_BxTxHxP, *given, initial_state=ssm_state, segment_ids=segment_ids)
        y_BxTxD = self.out_proj(self.norm(y_BxTxHxP.reshape(B, T, self.inner), z).astype(x.dtype))
        if state is None:
            return y_BxTxD, None
        cursor = advance(state.cursor, segment_ids, B, T)[2]
        return y_BxTxD, Mamba2State(conv_state, ssm_state, cursor)

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`: by it the convolved x becomes what is normalised, D included."""
        _, *given, _, _ = self._given(x, None, segment_ids)
        return by_head(ssd(each_apart(x, self.heads), *given, segment_ids=segment_ids)[0])

    def _given(self, x: jax.Array, conv_state: jax.Array | None, segment_ids: jax.Array | None) -> tuple:
        """x [B, T, inner], dt, A, B, C and D as `ssd` takes them, the gate, and the convolution's state."""
        config, shape = self.config, x.shape[:2]
        z, xBC, dt_BxTxH = jnp.split(self.in_proj(x), (self.inner, self.inner + self.convolved), axis=-1)
        xBC, conv_state = causal_conv(
            xBC,
            self.conv_weight[...].astype(x.dtype),
            None if self.conv_bias is None else self.conv_bias[...].astype(x.dtype),
            initial_state=conv_state,
            segment_ids=segment_ids,
        )
        x_, B_, C_ = jnp.split(jax.nn.silu(xBC), (self.inner, self.inner + config.groups * config.state), axis=-1)
        dt_BxTxH = jax.nn.softplus(dt_BxTxH.astype(jnp.float32) + self.dt_bias[...])
        if config.dt_limit is not None:
            dt_BxTxH = jnp.clip(dt_BxTxH, *config.dt_limit)
        B_BxTxGxN, C_BxTxGxN = (part.reshape(*shape, config.groups, config.state) for part in (B_, C_))
        return x_, dt_BxTxH, -jnp.exp(self.A_log[...]), B_BxTxGxN, C_BxTxGxN, self.D[...], z, conv_state


class GatedRMSNorm(nnx.Module):
    """x · silu(z), each group of channels divided by its root mean square, · scale; in float32."""

    def __init__(self, width: int, groups: int, rngs: nnx.Rngs, *, epsilon: float):
        self.scale = parameter(constant(1.0), (width,), ("inner",), rngs)
        self.groups = groups
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """[..., D] and the gate's [..., D] -> float32 [..., D]."""
        x = x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        groups = x.reshape(*x.shape[:-1], self.groups, -1)
        groups *= jax.lax.rsqrt(jnp.mean(jnp.square(groups), -1, keepdims=True) + self.epsilon)
        return groups.reshape(x.shape) * self.scale[...]
