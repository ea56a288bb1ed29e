"""Attention with grouped queries (Vaswani et al. 2017; Ainslie et al. 2023), and its cache."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from phyla.kernels.attention import Tokens, attention
from phyla.kernels.attention.mask import linear_bias, seen
from phyla.kernels.attention.xla import HIDDEN
from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.cursor import Cursor, advance, start
from phyla.models.errors import UserError, check_divides
from phyla.models.held import alike, floats
from phyla.models.layers import Layer, Linear, RMSNorm
from phyla.models.weights import fan_in


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotations, for sequences longer than those that a model was first trained on."""

    factor: float = 1.0
    """How many times slower; 1 for none of this."""
    original_length: int | None = None
    """None: every frequency (Chen et al. 2023). Else the first training's length: only the frequencies that turn less
    than `low_frequency` times in it are slowed, none that turn more than `high_frequency` times, and those between by
    part (Llama 3.1)."""
    low_frequency: float = 1.0
    """Turns in the original length."""
    high_frequency: float = 4.0
    """Turns in the original length."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayerConfig):
    """Scaled dot-product attention."""

    heads: int = 4
    """N, number of query heads."""
    kv_heads: int | None = None
    """Number of key and value heads, shared by groups of query heads; None: as many as query heads."""
    head_dim: int | None = None
    """H; None: width / heads."""
    positions: Literal["rope", "alibi", "none"] = "rope"
    """Rotary (Su et al. 2021), linear biases (Press et al. 2022), or none."""
    rope_base: float = 10_000.0
    """The longest wavelength of RoPE, over 2π."""
    rope_scaling: RopeScaling = RopeScaling()
    """For sequences longer than in training."""
    window: int | None = None
    """How many tokens back, itself included, a token sees; None: all."""
    stride: int | None = None
    """Beside the window, every so manieth token before a token (Child et al. 2019, strided); None: no others."""
    global_tokens: int = 0
    """Beside the window, so many first tokens of a document; if not causal, they see all (Longformer, BigBird)."""
    causal: bool = True
    """False: every token of a segment sees every other."""
    qk_norm: bool = False
    """RMSNorm of queries and keys over the head dimension."""
    qkv_bias: bool = False
    """Biases on the three input projections."""
    out_bias: bool = False
    """Bias on the output projection."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "Attention":
        """See `LayerConfig.build`."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        counts = {"heads": self.heads, "kv_heads": kv_heads, "window": self.window, "stride": self.stride}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"attention.{name} must be at least 1, not {value}")
        if self.window is None and (self.stride is not None or self.global_tokens):
            raise UserError(
                "attention.stride and attention.global_tokens need attention.window: without it all is seen"
            )
        if self.global_tokens < 0:
            raise UserError(f"attention.global_tokens must be at least 0, not {self.global_tokens}")
        check_divides("attention.kv_heads", kv_heads, "attention.heads", self.heads)
        if self.head_dim is None:
            check_divides("attention.heads", self.heads, "model.width", model.width)
        head_dim = self.resolved_head_dim(model)
        if head_dim < 1 or (self.positions == "rope" and head_dim % 2):
            raise UserError(f"attention.head_dim must be positive, and even for RoPE, not {head_dim}")
        return Attention(self, model, rngs)

    @property
    def reach(self) -> int | None:
        """How many tokens back a token is needed; None: to the end of its document."""
        return self.window if self.stride is None and not self.global_tokens else None

    def resolved_head_dim(self, model: ModelConfig) -> int:
        """H."""
        return model.width // self.heads if self.head_dim is None else self.head_dim

    def flops_per_token(self, model: ModelConfig, length: int) -> float:
        """See `LayerConfig.flops_per_token`: q·k and p·v over the keys that a token sees on average."""
        window = min(length, self.window or length)
        seen = window - window * window / (2 * length) if self.causal else window
        if self.stride is not None:
            beyond = length - window
            seen += (beyond * beyond / (2 * length) if self.causal else beyond) / self.stride
        if self.global_tokens:
            seen += min(self.global_tokens, length) * (length - window) / length
        return 4 * self.heads * self.resolved_head_dim(model) * seen

    def mixing_heads(self, model: ModelConfig) -> int:
        """See `LayerConfig.mixing_heads`."""
        return self.heads


class Cache(NamedTuple):
    """Keys and values of earlier tokens: all of them, or the last `reach`."""

    k: jax.Array  # [B, K, S, H], rotated; heads lie before time, as products take them: a step copies no cache
    v: jax.Array  # [B, K, S, H]
    began: jax.Array  # [B, S] int32, the token with which the slot's document began
    token: jax.Array  # [S] int32, which token of the sequence a slot holds; -1: none yet
    length: jax.Array  # [] int32, tokens seen so far
    cursor: Cursor


class Attention(Layer):
    """See `AttentionConfig`."""

    memory: ClassVar = {"k": (-1,), "v": (-1,)}  # a scale for each token and head

    def __init__(self, config: AttentionConfig, model: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.heads = config.heads
        self.kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        self.head_dim = config.resolved_head_dim(model)
        self.dtype = jnp.dtype(model.dtype)
        d, bias = model.width, config.qkv_bias
        self.q = Linear((d, self.heads * self.head_dim), ("embed", "heads"), rngs, bias=bias)
        self.k = Linear((d, self.kv_heads * self.head_dim), ("embed", "kv_heads"), rngs, bias=bias)
        self.v = Linear((d, self.kv_heads * self.head_dim), ("embed", "kv_heads"), rngs, bias=bias)
        # Each block adds to the residual stream twice: keep its variance (GPT-2, section 2.3).
        out = fan_in(1 / math.sqrt(2 * model.layers))
        self.o = Linear((self.heads * self.head_dim, d), ("heads", "embed"), rngs, bias=config.out_bias, init=out)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, rngs, epsilon=model.norm_epsilon, axis="head_dim")
            self.k_norm = RMSNorm(self.head_dim, rngs, epsilon=model.norm_epsilon, axis="head_dim")

    def initial_state(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens, or for the window if that is shorter."""
        slots = min(length, self.config.reach or length)
        shape = (batch, self.kv_heads, slots, self.head_dim)
        return Cache(
            k=jnp.zeros(shape, self.dtype),
            v=jnp.zeros(shape, self.dtype),
            began=jnp.zeros((batch, slots), jnp.int32),
            token=jnp.full((slots,), -1, jnp.int32),
            length=jnp.zeros((), jnp.int32),
            cursor=start(batch),
        )

    def with_room(self, state: Cache, length: int) -> Cache:
        """The cache with free slots for `length` tokens more, or as many as the window has: see `_extend`."""
        window, slots = self.config.reach, len(state.token)
        more = length if window is None else max(0, min(slots + length, window) - slots)
        at = (0, more) if window is None else (more, 0)

        def pad(leaf: jax.Array, value: int = 0) -> jax.Array:
            width = [at if axis == _time(leaf) else (0, 0) for axis in range(leaf.ndim)]
            return jnp.pad(leaf, width, constant_values=value)

        k, v, began = jax.tree.map(pad, (state.k, state.v, state.began))
        return state._replace(k=k, v=v, began=began, token=pad(state.token, -1))

    def __call__(
        self, x: jax.Array, state: Cache | None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D] and the cache with these T tokens (None if None was given).

        A cache made for S tokens holds S: feeding it more is the caller's error and is not detected under jit.
        Raises UserError for a cache on bidirectional attention.
        """
        config, T = self.config, x.shape[1]
        _, positions_BxT, cursor = advance(state and state.cursor, segment_ids, *x.shape[:2])
        q_BxTxNxH, k_BxTxKxH, v_BxTxKxH = self._projected(x, positions_BxT)
        if state is not None and not config.causal:
            raise UserError("bidirectional attention has no cache: call it with state=None")
        token_T = jnp.arange(T, dtype=jnp.int32) + (0 if state is None else state.length)
        # Without segments there is one document, and nothing to compare.
        packed = segment_ids is not None or state is not None
        queries = keys = Tokens(token_T, token_T - positions_BxT if packed else None)
        if state is not None:
            new = jnp.swapaxes(k_BxTxKxH, 1, 2), jnp.swapaxes(v_BxTxKxH, 1, 2), queries.began, token_T
            (k, v, began_BxS, token_S), kept = self._extend(state, new)
            k_BxTxKxH, v_BxTxKxH = (jnp.swapaxes(floats(part).astype(x.dtype), 1, 2) for part in (k, v))
            keys = Tokens(token_S, began_BxS)
            state = Cache(*kept, length=state.length + T, cursor=cursor)
        y_BxTxNxH = attention(
            q_BxTxNxH,
            k_BxTxKxH,
            v_BxTxKxH,
            queries,
            keys,
            causal=config.causal,
            window=config.window,
            stride=config.stride,
            everywhere=config.global_tokens,
            slopes=alibi_slopes(self.heads) if config.positions == "alibi" else None,
        )
        return self.o(rearrange(y_BxTxNxH, "b t n h -> b t (n h)")), state

    def projected(self, x: jax.Array, segment_ids: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of x [B, T, D], [B, T, N, H] each: those that several heads share are repeated."""
        q, k, v = self._projected(x, advance(None, segment_ids, *x.shape[:2])[1])
        k, v = (jnp.repeat(part, self.heads // self.kv_heads, axis=2) for part in (k, v))
        return q, k, v

    def seen(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Which tokens a token attends to, bool [1 or B, T, T]."""
        tokens = _tokens(advance(None, segment_ids, *x.shape[:2])[1], segment_ids is not None)
        config = self.config
        return seen(tokens, tokens, config.causal, config.window, config.stride, config.global_tokens)

    def scores(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """What the softmax is of, float32 [B, N, T, T]; of tokens that are not `seen` -1e30."""
        q, k, _ = self.projected(x, segment_ids)
        scores_BxNxTxT = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * self.head_dim**-0.5
        if self.config.positions == "alibi":
            tokens = _tokens(jnp.zeros(x.shape[:2], jnp.int32), False)
            scores_BxNxTxT += linear_bias(alibi_slopes(self.heads), tokens, tokens)
        return jnp.where(self.seen(x, segment_ids)[:, None], scores_BxNxTxT, HIDDEN)

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """See `Layer.mixing`."""
        return jax.nn.softmax(self.scores(x, segment_ids), axis=-1)

    def _projected(self, x: jax.Array, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, N, H], k and v [B, T, K, H], normalised and rotated."""
        config = self.config
        q_BxTxNxH = rearrange(self.q(x), "b t (n h) -> b t n h", n=self.heads)
        k_BxTxKxH = rearrange(self.k(x), "b t (n h) -> b t n h", n=self.kv_heads)
        v_BxTxKxH = rearrange(self.v(x), "b t (n h) -> b t n h", n=self.kv_heads)
        if config.qk_norm:
            q_BxTxNxH = self.q_norm(q_BxTxNxH).astype(x.dtype)
            k_BxTxKxH = self.k_norm(k_BxTxKxH).astype(x.dtype)
        if config.positions == "rope":
            q_BxTxNxH = rotate(q_BxTxNxH, positions_BxT, config.rope_base, config.rope_scaling)
            k_BxTxKxH = rotate(k_BxTxKxH, positions_BxT, config.rope_base, config.rope_scaling)
        return q_BxTxNxH, k_BxTxKxH, v_BxTxKxH

    def _extend(self, state: Cache, new: tuple) -> tuple[tuple, tuple]:
        """What the new tokens may look at, and what the cache keeps: (k, v, began, token) each."""
        old = state.k, state.v, state.began, state.token
        new, more = alike(new, old), len(new[-1])

        def extended(o: jax.Array, n: jax.Array) -> jax.Array:
            n = n.astype(o.dtype)
            if self.config.reach is None:
                return jax.lax.dynamic_update_slice_in_dim(o, n, state.length, _time(o))
            return jnp.concatenate([o, n], _time(o))

        seen = jax.tree.map(extended, old, new)
        if self.config.reach is None:
            return seen, seen
        # A window's cache is short: append, look, keep the end.
        return seen, jax.tree.map(lambda s: jax.lax.slice_in_dim(s, more, None, axis=_time(s)), seen)


def _time(part: jax.Array) -> int:
    """The axis of a cache's slots: of token [S], of began [B, S], of k and v [B, K, S, H]."""
    return part.ndim // 2


def _tokens(positions_BxT: jax.Array, packed: bool) -> Tokens:
    token_T = jnp.arange(positions_BxT.shape[1], dtype=jnp.int32)
    return Tokens(token_T, token_T - positions_BxT if packed else None)


def rotate(
    x_BxTxNxH: jax.Array,
    positions_BxT: jax.Array,
    base: float,
    scaling: RopeScaling = RopeScaling(),
) -> jax.Array:
    """Rotary position embedding of the two halves of the head dimension, in float32 (Su et al. 2021, equation 34)."""
    half = x_BxTxNxH.shape[-1] // 2
    frequency_h = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.factor != 1:
        slowed_h = 1.0
        if scaling.original_length is not None:
            turns_h = frequency_h * (scaling.original_length / (2 * math.pi))
            low, high = scaling.low_frequency, scaling.high_frequency
            slowed_h = jnp.clip((high - turns_h) / (high - low), 0, 1)
        frequency_h *= slowed_h / scaling.factor + (1 - slowed_h)
    angle_BxTx1xh = positions_BxT[:, :, None, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle_BxTx1xh), jnp.sin(angle_BxTx1xh)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def alibi_slopes(heads: int) -> jax.Array:
    """Each head's slope, [N] (Press et al. 2022, section 3; for N not a power of two as in their code)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return jnp.asarray(slopes, jnp.float32)
