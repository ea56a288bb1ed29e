"""Mamba-1: a gated, convolved selective state space (Gu and Dao 2023, section 3.4)."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.causal_conv import causal_conv
from phyla.kernels.selective_scan import selective_scan
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError
from phyla.models.layers import Layer, Linear, RMSNorm
from phyla.models.weights import constant, fan_in, parameter, taps, uniform


@dataclass(frozen=True, kw_only=True)
class MambaConfig(LayerConfig):
    """The selective state space of Mamba-1."""

    expand: float = 2.0
    """Inner width over the model's width."""
    state: int = 16
    """N, the state's size per inner channel."""
    conv: int = 4
    """Width of the causal convolution."""
    dt_rank: int | None = None
    """Rank of the step size's projection; None: width / 16, rounded up."""
    bias: bool = False
    """Biases on the input and output projections."""
    conv_bias: bool = True
    """Bias on the convolution."""
    norms: bool = False
    """RMSNorm of dt's low-rank form (before its projection), of B and of C (Lieber et al. 2024, Jamba)."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "Mamba":
        """See `LayerConfig.build`."""
        for name in ("state", "conv"):
            if getattr(self, name) < 1:
                raise UserError(f"mamba.{name} must be at least 1, not {getattr(self, name)}")
        if self.inner(model) < 1:
            raise UserError(f"mamba.expand must give at least one inner channel, not {self.expand}")
        return Mamba(self, model, rngs)

    def inner(self, model: ModelConfig) -> int:
        """The inner width."""
        return round(self.expand * model.width)

    def rank(self, model: ModelConfig) -> int:
        """Of the step size's projection."""
        return self.dt_rank or math.ceil(model.width / 16)

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: per channel, 2 for each tap and 6 for each state (and one exp)."""
        return self.inner(model) * (2 * self.conv + 7 * self.state)


class MambaState(NamedTuple):
    """What a Mamba layer remembers, in float32."""

    conv: jax.Array  # [B, conv - 1, inner]
    scan: jax.Array  # [B, inner, N]
    cursor: Cursor


class Mamba(Layer):
    """See `MambaConfig`."""

    memory: ClassVar = {"scan": (-1,)}  # a scale for each channel

    def __init__(self, config: MambaConfig, model: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        d, inner, N = model.width, config.inner(model), config.state
        self.inner = inner
        self.dt_rank = config.rank(model)
        self.in_proj = Linear((d, 2 * inner), ("embed", "inner"), rngs, bias=config.bias)
        self.conv_weight = parameter(
            taps(config.conv), (config.conv, inner), ("conv", "inner"), rngs, weight_decay=True
        )
        self.conv_bias = parameter(taps(config.conv), (inner,), ("inner",), rngs) if config.conv_bias else None
        self.x_proj = Linear((inner, self.dt_rank + 2 * N), ("inner", "state"), rngs)
        if config.norms:
            norm = functools.partial(RMSNorm, rngs=rngs, epsilon=model.norm_epsilon)
            self.dt_norm, self.B_norm, self.C_norm = norm(self.dt_rank), norm(N), norm(N)
        rate, why = uniform(self.dt_rank**-0.5), "dt is in the exponent of every decay"
        self.dt_proj = Linear((self.dt_rank, inner), ("state", "inner"), rngs, init=rate, precise=why)
        self.dt_bias = parameter(initial_dt_bias, (inner,), ("inner",), rngs)
        # A = -1 … -N in every channel (S4D-real).
        a_log = lambda key, shape: jnp.broadcast_to(jnp.log(jnp.arange(1, N + 1)), shape)  # noqa: E731
        self.A_log = parameter(a_log, (inner, N), ("inner", "state"), rngs)
        self.D = parameter(constant(1.0), (inner,), ("inner",), rngs)
        out = fan_in(1 / math.sqrt(model.layers))
        self.out_proj = Linear((inner, d), ("inner", "embed"), rngs, bias=config.bias, init=out)

    def initial_state(self, batch: int, length: int) -> MambaState:
        """Zeros; the same size for any length."""
        return MambaState(
            conv=jnp.zeros((batch, self.config.conv - 1, self.inner)),
            scan=jnp.zeros((batch, self.inner, self.config.state)),
            cursor=start(batch),
        )

    def __call__(
        self, x: jax.Array, state: MambaState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, MambaState | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        B, T, _ = x.shape
        conv_state = scan_state = None
        if state is not None:
            conv_state, scan_state = carry(state.cursor, segment_ids, (state.conv, state.scan))
        u_BxTxD, z_BxTxD = jnp.split(self.in_proj(x), 2, axis=-1)
        u_BxTxD, conv_state = causal_conv(
            u_BxTxD,
            self.conv_weight[...].astype(x.dtype),
            None if self.conv_bias is None else self.conv_bias[...].astype(x.dtype),
            initial_state=conv_state,
            segment_ids=segment_ids,
        )
        u_BxTxD = jax.nn.silu(u_BxTxD)
        low_rank, B_BxTxN, C_BxTxN = jnp.split(
            self.x_proj(u_BxTxD), (self.dt_rank, self.dt_rank + self.config.state), axis=-1
        )
        if self.config.norms:
            low_rank, B_BxTxN, C_BxTxN = (
                norm(part).astype(x.dtype)
                for norm, part in ((self.dt_norm, low_rank), (self.B_norm, B_BxTxN), (self.C_norm, C_BxTxN))
            )
        dt_BxTxD = jax.nn.softplus(self.dt_proj(low_rank).astype(jnp.float32) + self.dt_bias[...])
        y_BxTxD, scan_state = selective_scan(
            u_BxTxD,
            dt_BxTxD,
            -jnp.exp(self.A_log[...]),
            B_BxTxN,
            C_BxTxN,
            self.D[...],
            initial_state=scan_state,
            segment_ids=segment_ids,
        )
        y_BxTxD = self.out_proj(y_BxTxD * jax.nn.silu(z_BxTxD))
        if state is None:
            return y_BxTxD, None
        cursor = advance(state.cursor, segment_ids, B, T)[2]
        return y_BxTxD, MambaState(conv_state, scan_state, cursor)


def initial_dt_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse softplus of step sizes drawn log-uniformly from [1e-3, 0.1] (section 3.6)."""
    low, high = math.log(1e-3), math.log(0.1)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))
