"""mLSTM: the mixer of xLSTM-7B (Beck et al. 2025, arXiv 2503.13427) and the first block (arXiv 2405.04517, figure 11).

The initialisation is that of the authors' packages, xlstm and xlstm-jax.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.causal_conv import causal_conv
from phyla.kernels.mlstm import Gate, mlstm
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError, check_divides
from phyla.models.headwise import HeadNorm, HeadwiseLinear
from phyla.models.layers import Layer, Linear, by_head, each_apart
from phyla.models.weights import constant, normal, parameter, taps

EXPONENT = "a gate is in the exponent of all that follows"


@dataclass(frozen=True, kw_only=True)
class MLSTMConfig(LayerConfig):
    """The mixer of xLSTM-7B: a matrix memory for each head, and an output gate."""

    heads: int = 4
    """H, matrix memories."""
    qk_expand: float = 0.5
    """Width of all queries (and of all keys) over the model's width."""
    v_expand: float = 1.0
    """Width of all values over the model's width."""
    gate: Gate = "exponential"
    """Activation of the input gate; the sigmoid needs no normaliser (Beck et al. 2025, arXiv 2503.14376)."""
    gate_cap: float | None = 15.0
    """c: the gates' pre-activations x become c · tanh(x / c); None for no cap."""
    input_bias: float = -10.0
    """Of the input gate at first."""
    epsilon: float = 1e-6
    """Added to the normaliser."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "MLSTM":
        """See `LayerConfig.build`."""
        for name, width in (("qk_expand", self.qk_width(model)), ("v_expand", self.v_width(model))):
            check_divides("mlstm.heads", self.heads, f"the width of mlstm.{name}", width)
        if self.gate_cap is not None and not self.gate_cap > 0:
            raise UserError(f"mlstm.gate_cap must be positive, not {self.gate_cap}")
        return MLSTM(self, model, rngs)

    def qk_width(self, model: ModelConfig) -> int:
        """Of all queries, and of all keys."""
        return round(self.qk_expand * model.width)

    def v_width(self, model: ModelConfig) -> int:
        """Of all values."""
        return round(self.v_expand * model.width)

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: 5 for each number of the state."""
        return 5 * self.qk_width(model) * (self.v_width(model) // self.heads + 1)

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.heads


@dataclass(frozen=True, kw_only=True)
class MLSTMBlockConfig(LayerConfig):
    """The first mLSTM block: projected up, convolved, remembered, gated and projected down; needs no channel mixer."""

    heads: int = 4
    """H, matrix memories."""
    expand: float = 2.0
    """Inner width over the model's width."""
    round_to: int = 1
    """The inner width is rounded up to a multiple of this; 1: to the nearest integer."""
    conv: int = 4
    """Width of the causal convolution."""
    projection: int = 4
    """Channels that the block-diagonal maps to queries, keys and values mix."""
    gate: Gate = "exponential"
    """Activation of the input gate; the sigmoid needs no normaliser (Beck et al. 2025, arXiv 2503.14376)."""
    input_bias: float = 0.0
    """Of the input gate at first, on average."""
    bias: bool = False
    """Biases on all projections."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "MLSTMBlock":
        """See `LayerConfig.build`."""
        for name in ("conv", "round_to"):
            if getattr(self, name) < 1:
                raise UserError(f"mlstm_block.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("heads", "projection"):
            check_divides(f"mlstm_block.{name}", getattr(self, name), "the inner width", self.inner(model))
        return MLSTMBlock(self, model, rngs)

    def inner(self, model: ModelConfig) -> int:
        """The inner width."""
        if self.round_to == 1:
            return round(self.expand * model.width)
        return math.ceil(self.expand * model.width / self.round_to) * self.round_to

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: 2 for each tap and 5 for each number of the state."""
        inner = self.inner(model)
        return inner * (2 * self.conv + 5 * (inner // self.heads + 1))

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.heads


class MLSTMState(NamedTuple):
    """What a mixer remembers, in float32."""

    memory: tuple[jax.Array, ...]  # C [B, H, K, V], n [B, H, K], m [B, H]; C alone with the sigmoid gate
    cursor: Cursor


class MLSTMBlockState(NamedTuple):
    """What a block remembers, in float32."""

    conv: jax.Array  # [B, conv - 1, inner]
    memory: tuple[jax.Array, ...]  # as of `MLSTMState`
    cursor: Cursor


class MLSTM(Layer):
    """See `MLSTMConfig`."""

    memory: ClassVar = {"memory.0": (-1,)}  # C, a scale for each key; n and m divide it

    def __init__(self, config: MLSTMConfig, model: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, qk, v, H = model.width, config.qk_width(model), config.v_width(model), config.heads
        self.memory_shape = (H, qk // H, v // H)
        small = _small(D)
        self.q = Linear((D, qk), ("embed", "inner"), rngs, init=small)
        self.k = Linear((D, qk), ("embed", "inner"), rngs, init=small)
        self.v = Linear((D, v), ("embed", "inner"), rngs, init=small)
        self.o_gate = Linear((D, v), ("embed", "inner"), rngs, init=small)
        self.i_gate = Linear((D, H), ("embed", "heads"), rngs, init=constant(0.0), precise=EXPONENT)
        self.f_gate = Linear((D, H), ("embed", "heads"), rngs, init=constant(0.0), precise=EXPONENT)
        self.i_bias = parameter(constant(config.input_bias), (H,), ("heads",), rngs)
        self.f_bias = parameter(_spread, (H,), ("heads",), rngs)
        self.norm = HeadNorm(v, rngs, epsilon=model.norm_epsilon)
        self.out = Linear((v, D), ("inner", "embed"), rngs, init=_wang(model))

    def initial_state(self, batch: int, length: int) -> MLSTMState:
        """Zeros; the same size for any length."""
        return MLSTMState(_memory(batch, *self.memory_shape, self.config.gate), start(batch))

    def __call__(
        self, x: jax.Array, state: MLSTMState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, MLSTMState | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        q, k, *gates = self._given(x)
        h_BxTxHxV, memory = mlstm(
            q,
            k,
            _heads(self.v(x), self.config.heads),
            *gates,
            initial_state=None if state is None else carry(state.cursor, segment_ids, state.memory),
            segment_ids=segment_ids,
            gate=self.config.gate,
            epsilon=self.config.epsilon,
        )
        h_BxTxD = self.norm(h_BxTxHxV) * jax.nn.sigmoid(self.o_gate(x).astype(jnp.float32))
        y_BxTxD = self.out(h_BxTxD.astype(x.dtype))
        if state is None:
            return y_BxTxD, None
        return y_BxTxD, MLSTMState(memory, advance(state.cursor, segment_ids, *x.shape[:2])[2])

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`: the normaliser is in it, the norm that follows is not."""
        q, k, *gates = self._given(x)
        config = self.config
        given = {"segment_ids": segment_ids, "gate": config.gate, "epsilon": config.epsilon}
        return by_head(mlstm(q, k, each_apart(x, config.heads), *gates, **given)[0])

    def _given(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys, and the gates before their activations."""
        return (
            _heads(self.q(x), self.config.heads),
            _heads(self.k(x), self.config.heads),
            self._capped(self.i_gate(x) + self.i_bias[...]),
            self._capped(self.f_gate(x) + self.f_bias[...]),
        )

    def _capped(self, gate: jax.Array) -> jax.Array:
        cap = self.config.gate_cap
        return gate if cap is None else cap * jnp.tanh(gate / cap)


class MLSTMBlock(Layer):
    """See `MLSTMBlockConfig`."""

    memory: ClassVar = {"memory.0": (-1,)}  # C, a scale for each key; n and m divide it

    def __init__(self, config: MLSTMBlockConfig, model: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, inner, H, bias = model.width, config.inner(model), config.heads, config.bias
        self.inner = inner
        small, groups = _small(D), inner // config.projection
        self.up = Linear((D, 2 * inner), ("embed", "inner"), rngs, bias=bias, init=small)
        self.conv_weight = parameter(
            taps(config.conv), (config.conv, inner), ("conv", "inner"), rngs, weight_decay=True
        )
        self.conv_bias = parameter(taps(config.conv), (inner,), ("inner",), rngs)
        self.q = HeadwiseLinear(groups, inner, rngs, bias=bias, init=small)
        self.k = HeadwiseLinear(groups, inner, rngs, bias=bias, init=small)
        self.v = HeadwiseLinear(groups, inner, rngs, bias=bias, init=small)
        self.i_gate = Linear((3 * inner, H), ("inner", "gates"), rngs, init=constant(0.0), precise=EXPONENT)
        self.f_gate = Linear((3 * inner, H), ("inner", "gates"), rngs, init=constant(0.0), precise=EXPONENT)
        noise = normal(0.1)
        self.i_bias = parameter(lambda key, shape: config.input_bias + noise(key, shape), (H,), ("heads",), rngs)
        self.f_bias = parameter(_spread, (H,), ("heads",), rngs)
        self.norm = HeadNorm(inner, rngs, epsilon=model.norm_epsilon)
        self.skip = parameter(constant(1.0), (inner,), ("inner",), rngs)
        self.down = Linear((inner, D), ("inner", "embed"), rngs, bias=bias, init=_wang(model))

    def initial_state(self, batch: int, length: int) -> MLSTMBlockState:
        """Zeros; the same size for any length."""
        size = self.inner // self.config.heads
        return MLSTMBlockState(
            conv=jnp.zeros((batch, self.config.conv - 1, self.inner)),
            memory=_memory(batch, self.config.heads, size, size, self.config.gate),
            cursor=start(batch),
        )

    def __call__(
        self, x: jax.Array, state: MLSTMBlockState | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, MLSTMBlockState | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        conv = memory = None
        if state is not None:
            conv, memory = carry(state.cursor, segment_ids, (state.conv, state.memory))
        q, k, v, i, f, c_BxTxI, z_BxTxI, conv = self._given(x, conv, segment_ids)
        h_BxTxHxV, memory = mlstm(q, k, v, i, f, initial_state=memory, segment_ids=segment_ids, gate=self.config.gate)
        h_BxTxI = self.norm(h_BxTxHxV) + self.skip[...] * c_BxTxI
        y_BxTxD = self.down(h_BxTxI.astype(x.dtype) * jax.nn.silu(z_BxTxI))
        if state is None:
            return y_BxTxD, None
        return y_BxTxD, MLSTMBlockState(conv, memory, advance(state.cursor, segment_ids, *x.shape[:2])[2])

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`: the normaliser is in it, the norm that follows and the skip are not."""
        q, k, _, *gates = self._given(x, None, segment_ids)[:5]
        values = each_apart(x, self.config.heads)
        return by_head(mlstm(q, k, values, *gates, segment_ids=segment_ids, gate=self.config.gate)[0])

    def _given(self, x: jax.Array, conv: jax.Array | None, segment_ids: jax.Array | None) -> tuple:
        """q, k, v, i and f as `mlstm` takes them; what was convolved, the output gate, the convolution's state."""
        H = self.config.heads
        u_BxTxI, z_BxTxI = jnp.split(self.up(x), 2, axis=-1)
        c_BxTxI, conv = causal_conv(
            u_BxTxI,
            self.conv_weight[...].astype(x.dtype),
            self.conv_bias[...].astype(x.dtype),
            initial_state=conv,
            segment_ids=segment_ids,
        )
        c_BxTxI = jax.nn.silu(c_BxTxI)
        q, k, v = self.q(c_BxTxI), self.k(c_BxTxI), self.v(u_BxTxI)
        of_gates = jnp.concatenate((q, k, v), axis=-1)
        i, f = self.i_gate(of_gates) + self.i_bias[...], self.f_gate(of_gates) + self.f_bias[...]
        return _heads(q, H), _heads(k, H), _heads(v, H), i, f, c_BxTxI, z_BxTxI, conv


def _memory(batch: int, H: int, K: int, V: int, gate: Gate) -> tuple[jax.Array, ...]:
    C = jnp.zeros((batch, H, K, V))
    return (C,) if gate == "sigmoid" else (C, jnp.zeros((batch, H, K)), jnp.zeros((batch, H)))


def _heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, D] -> [B, T, H, D / H]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _spread(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Forget gates that remember from some 20 to some 400 tokens."""
    return jnp.linspace(3.0, 6.0, shape[0])


def _small(width: int):
    """Nguyen and Salazar 2019, "small init"."""
    return normal(math.sqrt(2 / (5 * width)))


def _wang(model: ModelConfig):
    """Wang and Komatsuzaki 2021, for what is added to the residual stream."""
    return normal(2 / model.layers / math.sqrt(model.width))
