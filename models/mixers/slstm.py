"""sLSTM: a recurrent network with exponential gates and a head's own output in its gates (Beck et al. 2024)."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.causal_conv import causal_conv
from phyla.kernels.slstm import State, slstm
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError, check_divides
from phyla.models.headwise import HeadNorm, HeadwiseLinear
from phyla.models.layers import Layer
from phyla.models.mixers.rwkv4 import averages
from phyla.models.weights import constant, normal, parameter, taps


@dataclass(frozen=True, kw_only=True)
class SLSTMConfig(LayerConfig):
    """The sLSTM layer of xLSTM (appendix A.2), without an output projection: the block's gated MLP follows it."""

    heads: int = 4
    """H, the heads; memory mixes within each."""
    conv: int = 4
    """Width of the causal convolution before the input and forget gates; 0 for none."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "SLSTM":
        """See `LayerConfig.build`."""
        if self.heads < 1:
            raise UserError(f"slstm.heads must be at least 1, not {self.heads}")
        if self.conv < 0:
            raise UserError(f"slstm.conv must be at least 0, not {self.conv}")
        check_divides("slstm.heads", self.heads, "model.width", model.width)
        return SLSTM(self, model, rngs, layer)

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: per cell, 2 for each tap and each recurrent connection, and 20."""
        return model.width * (2 * self.conv + 8 * model.width / self.heads + 20)


class SLSTMState(NamedTuple):
    """What an sLSTM layer remembers, in float32."""

    conv: jax.Array | None  # [B, conv - 1, D]
    cell: State  # c, n, h, m, each [B, H, P]
    cursor: Cursor


class SLSTM(Layer):
    """See `SLSTMConfig`."""

    memory: ClassVar = {"cell.0": (-1,), "cell.1": (-1,), "cell.2": (-1,)}  # c and n as averages and ones

    def __init__(self, config: SLSTMConfig, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int):
        self.config = config
        self.width = D = model.width
        H, P = config.heads, D // config.heads
        if config.conv:
            self.conv_weight = parameter(
                taps(config.conv), (config.conv, D), ("conv", "inner"), rngs, weight_decay=True
            )
            self.conv_bias = parameter(taps(config.conv), (D,), ("inner",), rngs)
        small = normal(math.sqrt(2 / (5 * D)))
        self.i = HeadwiseLinear(H, D, rngs, init=small)
        self.f = HeadwiseLinear(H, D, rngs, init=small)
        self.z = HeadwiseLinear(H, D, rngs, init=small)
        self.o = HeadwiseLinear(H, D, rngs, init=small)
        axes = ("gates", "heads", "head_dim")
        self.recurrent = parameter(constant(0.0), (4, H, P, P), (*axes, "head_dim"), rngs)
        depth = layer / max(model.layers - 1, 1)
        self.bias = parameter(lambda key, shape: _bias(shape, depth), (4, H, P), axes, rngs)
        self.norm = HeadNorm(D, rngs, epsilon=model.norm_epsilon)

    def initial_state(self, batch: int, length: int) -> SLSTMState:
        """Zeros; the same size for any length."""
        H, D = self.config.heads, self.width
        conv = jnp.zeros((batch, self.config.conv - 1, D)) if self.config.conv else None
        zeros = jnp.zeros((batch, H, D // H))
        return SLSTMState(conv, (zeros, zeros, zeros, zeros), start(batch))

    def __call__(
        self, x: jax.Array, state: SLSTMState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, SLSTMState | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        B, T, _ = x.shape
        conv_state = cell = None
        if state is not None:
            conv_state, cell = carry(state.cursor, segment_ids, (state.conv, state.cell))
        u_BxTxD = x
        if self.config.conv:
            u_BxTxD, conv_state = causal_conv(
                x,
                self.conv_weight[...].astype(x.dtype),
                self.conv_bias[...].astype(x.dtype),
                initial_state=conv_state,
                segment_ids=segment_ids,
            )
            u_BxTxD = jax.nn.silu(u_BxTxD)

        def heads(gate_BxTxD: jax.Array) -> jax.Array:
            return gate_BxTxD.reshape(B, T, self.config.heads, -1)

        h_BxTxHxP, cell = slstm(
            heads(self.i(u_BxTxD)),
            heads(self.f(u_BxTxD)),
            heads(self.z(x)),
            heads(self.o(x)),
            self.recurrent[...],
            self.bias[...],
            initial_state=cell,
            segment_ids=segment_ids,
        )
        y_BxTxD = self.norm(h_BxTxHxP).astype(x.dtype)
        if state is None:
            return y_BxTxD, None
        if self.held:
            total, weight, h, exponent = cell
            c, n, m = averages(total, weight, exponent)
            cell = c, n, h, m
        return y_BxTxD, SLSTMState(conv_state, cell, advance(state.cursor, segment_ids, B, T)[2])


def _bias(shape: tuple[int, ...], depth: jax.Array | float) -> jax.Array:
    """Zero but for the forget gates: from 5 in a head's first cell to -7 in its last, sooner in the first layers.

    The forget gates' is the "power law" of the authors' code; depth is 0 in the first layer and 1 in the last.
    """
    P = shape[-1]
    forget_P = 5 - 12 * (jnp.arange(P) / max(P - 1, 1)) ** (0.3 + 1.3 * depth)
    return jnp.zeros(shape).at[1].set(forget_P)
