"""Mamba-3: a state space discretised by the trapezoidal rule, whose state rotates (arXiv 2603.15569).

This is the variant with a single input and output (SISO) as the authors' present code has it (state-spaces/mamba,
modules/mamba3.py): the decay rate depends on the token through a heavy-tailed function (their first release had
softplus there), and no norm stands before the output projection.

    h_t = α_t h_{t-1} + (1 - λ_t) Δ_t α_t v_{t-1} k_{t-1}' + λ_t Δ_t v_t k_t',  α_t = exp(Δ_t A_t)
    y_t = h_t q_t + D v_t

v is x; k and q are B and C, normalised, with a bias a head, and turned by the angle Σ π tanh(θ_t) Δ_t since the
document's start. There is no convolution.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.segments import starts
from phyla.kernels.ssd import ssd
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, carry, start
from phyla.models.errors import UserError, check_divides
from phyla.models.layers import Layer, Linear, RMSNorm, by_head, each_apart
from phyla.models.mixers.mamba import initial_dt_bias
from phyla.models.weights import constant, fan_in, parameter

SLOWEST = 1e-4  # the least decay rate


@dataclass(frozen=True, kw_only=True)
class Mamba3Config(LayerConfig):
    """The state space of Mamba-3, SISO."""

    expand: float = 2.0
    """Inner width over the model's width."""
    head_dim: int = 64
    """P, channels a head; it divides the inner width."""
    state: int = 128
    """N, the state's size per inner channel."""
    groups: int = 1
    """G, groups of heads that share B and C but for their biases."""
    rotated: float = 0.5
    """The share of the state that rotates, in pairs."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "Mamba3":
        """See `LayerConfig.build`."""
        for name in ("head_dim", "state", "groups"):
            if getattr(self, name) < 1:
                raise UserError(f"mamba3.{name} must be at least 1, not {getattr(self, name)}")
        if self.inner(model) < 1:
            raise UserError(f"mamba3.expand must give at least one inner channel, not {self.expand}")
        check_divides("mamba3.head_dim", self.head_dim, "the inner width", self.inner(model))
        check_divides("mamba3.groups", self.groups, "the number of heads", self.heads(model))
        if not 1 <= self.angles() <= self.state // 2:
            raise UserError(f"mamba3.rotated must be at most 1 and leave a pair to rotate, not {self.rotated}")
        return Mamba3(self, model, rngs)

    def inner(self, model: ModelConfig) -> int:
        """The inner width."""
        return round(self.expand * model.width)

    def heads(self, model: ModelConfig) -> int:
        """H."""
        return self.inner(model) // self.head_dim

    def angles(self) -> int:
        """S, the pairs that rotate."""
        return int(self.rotated * self.state) // 2

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: 5 for each state, as a recurrence; 12 for each pair that rotates."""
        return 5 * self.inner(model) * self.state + 12 * self.heads(model) * self.angles()

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.heads(model)


class Mamba3State(NamedTuple):
    """What a Mamba-3 layer remembers, in float32."""

    angle: jax.Array  # [B, H, S], radians in [-π, π]
    ssm: jax.Array  # [B, H, P, N]
    k: jax.Array  # [B, H, N], of the last token, rotated
    v: jax.Array  # [B, H, P], of the last token
    cursor: Cursor


class Mamba3(Layer):
    """See `Mamba3Config`."""

    memory: ClassVar = {"ssm": (-1,)}  # a scale for each channel; k, v and angle are of one token

    def __init__(self, config: Mamba3Config, model: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.inner, self.heads = config.inner(model), config.heads(model)
        shared = config.groups * config.state
        self.widths = (self.inner, self.inner, shared, shared, self.heads, self.heads, self.heads, config.angles())
        self.in_proj = Linear((model.width, sum(self.widths)), ("embed", "inner"), rngs)
        self.B_norm, self.C_norm = (RMSNorm(config.state, rngs, epsilon=model.norm_epsilon) for _ in range(2))
        by_head = (self.heads, config.state)
        self.B_bias, self.C_bias = (parameter(constant(1.0), by_head, ("heads", "state"), rngs) for _ in range(2))
        self.dt_bias = parameter(initial_dt_bias, (self.heads,), ("heads",), rngs)
        self.D = parameter(constant(1.0), (self.heads,), ("heads",), rngs)
        out = fan_in(1 / math.sqrt(model.layers))
        self.out_proj = Linear((self.inner, model.width), ("inner", "embed"), rngs, init=out)

    def initial_state(self, batch: int, length: int) -> Mamba3State:
        """Zeros; the same size for any length."""
        H, P, N = self.heads, self.config.head_dim, self.config.state
        return Mamba3State(
            angle=jnp.zeros((batch, H, self.config.angles())),
            ssm=jnp.zeros((batch, H, P, N)),
            k=jnp.zeros((batch, H, N)),
            v=jnp.zeros((batch, H, P)),
            cursor=start(batch),
        )

    def __call__(
        self, x: jax.Array, state: Mamba3State | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba3State | None]:
        """[B, T, D] -> [B, T, D] and the state after the last token (None if None was given)."""
        B, T, _ = x.shape
        before = state or self.initial_state(B, T)
        if state is not None:
            before = before._replace(**carry(state.cursor, segment_ids, _memory(state)))
        z, v, *given = self._split(x)
        v_BxTxHxP = v.reshape(B, T, self.heads, -1).astype(jnp.float32)
        y_BxTxHxP, angle, ssm, k, now = self._scanned(x, v_BxTxHxP, given, before, segment_ids)
        y_BxTxD = y_BxTxHxP.reshape(B, T, self.inner) * jax.nn.silu(z.astype(jnp.float32))
        y_BxTxD = self.out_proj(y_BxTxD.astype(x.dtype))
        if state is None:
            return y_BxTxD, None
        angle, k, v, now = (part[:, -1] for part in (angle, k, v_BxTxHxP, now))
        ssm += (now[..., None] * v)[..., None] * k[..., None, :]
        return y_BxTxD, Mamba3State(angle, ssm, k, v, advance(state.cursor, segment_ids, B, T)[2])

    def _split(self, x: jax.Array) -> list[jax.Array]:
        """Gate, values, and what decides how they are mixed."""
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
        return jnp.split(self.in_proj(x), ends, axis=-1)

    def _scanned(
        self,
        x: jax.Array,
        v_BxTxHxP: jax.Array,
        given: list[jax.Array],
        before: Mamba3State,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, ...]:
        """The values mixed, [B, T, H, P]; the angles, the state, the keys and the weights of the tokens themselves."""
        B_, C_, dt, rate, mix, angle = given
        dt_BxTxH = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        log_decay_BxTxH = -dt_BxTxH * jnp.maximum(_heavy_tailed(rate.astype(jnp.float32)), SLOWEST)
        mix_BxTxH = jax.nn.sigmoid(mix.astype(jnp.float32))

        turns_BxTxHxS = jnp.pi * jnp.tanh(angle.astype(jnp.float32))[:, :, None] * dt_BxTxH[..., None]
        angle_BxTxHxS = _accumulate(turns_BxTxHxS, before.angle, segment_ids)
        k_BxTxHxN = _rotate(self._by_head(B_, self.B_norm, self.B_bias), angle_BxTxHxS)
        q_BxTxHxN = _rotate(self._by_head(C_, self.C_norm, self.C_bias), angle_BxTxHxS)

        # A token enters the state with λ Δ at once, and with the next one's (1 - λ) Δ α at the next. As it fades by the
        # same α meanwhile, the scan is of the state before the token's own entry: there each enters once, with both.
        now_BxTxH, late_BxTxH = mix_BxTxH * dt_BxTxH, (1 - mix_BxTxH) * dt_BxTxH
        weight_BxTxH = late_BxTxH.at[:, 1:].add(now_BxTxH[:, :-1]) * jnp.exp(log_decay_BxTxH)
        if segment_ids is not None:
            weight_BxTxH = jnp.where(starts(segment_ids)[..., None], 0, weight_BxTxH)
        y_BxTxHxP, ssm = ssd(
            (weight_BxTxH[..., None] * _shift(v_BxTxHxP, before.v)).astype(x.dtype),
            jnp.ones_like(dt_BxTxH),
            log_decay_BxTxH,
            _shift(k_BxTxHxN, before.k).astype(x.dtype),
            q_BxTxHxN.astype(x.dtype),
            initial_state=before.ssm,
            segment_ids=segment_ids,
        )
        own_BxTxH = now_BxTxH * jnp.sum(k_BxTxHxN * q_BxTxHxN, axis=-1) + self.D[...]
        y_BxTxHxP = y_BxTxHxP + own_BxTxH[..., None] * v_BxTxHxP
        return y_BxTxHxP, angle_BxTxHxS, ssm, k_BxTxHxN, now_BxTxH

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`: D is in it."""
        B, T, _ = x.shape
        before = self.initial_state(B, T)._replace(v=jnp.zeros((B, self.heads, T)))
        before = before._replace(ssm=jnp.zeros((B, self.heads, T, self.config.state)))
        _, _, *given = self._split(x)
        return by_head(self._scanned(x, each_apart(x, self.heads), given, before, segment_ids)[0])

    def _by_head(self, v_BxTxGN: jax.Array, norm: RMSNorm, bias: nnx.Param) -> jax.Array:
        """Normalised, copied to each head of the group, with the head's bias: float32 [B, T, H, N]."""
        B, T, _ = v_BxTxGN.shape
        v_BxTxGxN = norm(v_BxTxGN.reshape(B, T, self.config.groups, self.config.state))
        return jnp.repeat(v_BxTxGxN, self.heads // self.config.groups, axis=2) + bias[...]


def _memory(state: Mamba3State) -> dict[str, jax.Array]:
    return {name: value for name, value in state._asdict().items() if name != "cursor"}


def _shift(v: jax.Array, before: jax.Array) -> jax.Array:
    """[B, T, ...], each token's taken from the token before it; the first one's is `before`."""
    return jnp.concatenate([before[:, None], v[:, :-1]], axis=1)


def _heavy_tailed(x: jax.Array) -> jax.Array:
    """1 + x above 0 and 1 / (1 - x) below: positive and smooth, and it grows and vanishes slowly."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))


def _accumulate(turns_BxTxHxS: jax.Array, angle_BxHxS: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The sum of the turns since the document's start, within [-π, π] so that it stays exact however long it is."""
    turns_BxTxHxS = turns_BxTxHxS.at[:, 0].add(angle_BxHxS)
    if segment_ids is None:
        return jax.lax.associative_scan(lambda a, b: _wrap(a + b), _wrap(turns_BxTxHxS), axis=1)

    def combine(a, b):
        return jnp.where(b[1], b[0], _wrap(a[0] + b[0])), a[1] | b[1]

    begins_BxTx1x1 = starts(segment_ids)[..., None, None]
    return jax.lax.associative_scan(combine, (_wrap(turns_BxTxHxS), begins_BxTx1x1), axis=1)[0]


def _wrap(angle: jax.Array) -> jax.Array:
    return angle - 2 * jnp.pi * jnp.round(angle / (2 * jnp.pi))


def _rotate(v: jax.Array, angle: jax.Array) -> jax.Array:
    """Turns the first S pairs (0, 1), (2, 3), … of v [..., N] by the angles [..., S]."""
    S = angle.shape[-1]
    even, odd = v[..., 0 : 2 * S : 2], v[..., 1 : 2 * S : 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([turned.reshape(*v.shape[:-1], 2 * S), v[..., 2 * S :]], axis=-1)
