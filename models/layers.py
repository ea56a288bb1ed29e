"""What mixers and channel mixers are, and the layers that hold parameters: linear maps, embeddings and norms."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.config import ModelConfig
from phyla.models.weights import (
    Initializer,
    Weight,
    constant,
    fan_in,
    grouped,
    matmul,
    matmul_transposed,
    normal,
    parameter,
    take,
)

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class Layer(nnx.Module):
    """A sequence mixer or a channel mixer: `layer(x_BxTxD, state=None, segment_ids=None) -> (y_BxTxD, state)`.

    Training passes the state None and gets None. Prefill passes `initial_state(batch, length)` and gets the state
    after the last token; decoding is the same call with T = 1. A change in `segment_ids` starts a new document.
    """

    shares_value: ClassVar[bool] = False
    """Takes the value of the first such layer, or None, as a fourth argument and returns it third (RWKV-7)."""
    routes: ClassVar[bool] = False
    """Returns a `Routing` third (mixtures of experts)."""
    memory: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """The parts of its state that 8 bits do for, by their paths in it, and the axes along which they share a scale.

    They are what is large. Tails of convolutions, shifted tokens, normalisers and stabilisers are not: a call uses them
    once, or divides by them, and they are small.
    """
    held: tuple[str, ...] = ()
    """Those of them that are codes between calls (`phyla.models.held`)."""

    def initial_state(self, batch: int, length: int) -> Any:
        """The state before the first token, with room for `length` tokens if it keeps them all; None: stateless."""
        return None

    def with_room(self, state: Any, length: int) -> Any:
        """A state that is full, with room for `length` tokens more if it keeps them all."""
        return state

    def mixing(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """The matrix M of each head by which values are weighed, y = M v, for x [B, T, D]: float32 [B, H, T, T].

        H is the configuration's `mixing_heads`; where that is None, there are none.
        """
        raise TypeError(f"{type(self).__name__} has no mixing matrices")


def each_apart(x: jax.Array, heads: int) -> jax.Array:
    """Values, float32 [B, T, H, T], of which token t's is 1 at t: what a linear mixer makes of them is its matrix."""
    (B, T, _), own = x.shape, jnp.eye(x.shape[1])
    return jnp.broadcast_to(own[:, None], (B, T, heads, T))


def by_head(y_BxTxHxT: jax.Array) -> jax.Array:
    """What a mixer made of `each_apart`, as [B, H, T, T] in float32."""
    return jnp.moveaxis(y_BxTxHxT, 2, 1).astype(jnp.float32)


class Linear(nnx.Module):
    """y = x W + b, computed in x's dtype. `weight` (in, out) is a Param or a `Weight`."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        init: Initializer | None = None,
        precise: str = "",
    ):
        self.weight: nnx.Param | Weight = parameter(
            init or fan_in(), shape, axes, rngs, weight_decay=True, matrix=True, precise=precise
        )
        self.bias = parameter(constant(0.0), shape[1:], axes[1:], rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        y = matmul(x, self.weight)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class ExpertLinear(nnx.Module):
    """A matrix (in, out) for each expert. `weight` is a Param [E, in, out], or a `Weight` stacked over experts."""

    def __init__(
        self,
        experts: int,
        shape: tuple[int, int],
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        *,
        init: Initializer | None = None,
        share: float = 1.0,
    ):
        one = init or fan_in()

        def every(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.vmap(lambda key: one(key, shape[1:]))(jax.random.split(key, experts))

        self.weight: nnx.Param | Weight = parameter(
            every, (experts, *shape), ("experts", *axes), rngs, weight_decay=True, matrix=True, share=share
        )

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """[N, in] -> [N, out]; the first sizes[0] rows are the first expert's, the next sizes[1] the second's, …

        Rows after those of the last expert give zeros.
        """
        return grouped(x, self.weight, sizes)

    def chosen(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        """[N, in] -> [N, out], row n by the matrix of expert[n]: for few rows, since each reads a whole matrix."""
        of_rows = jax.tree.map(lambda leaf: jnp.take(leaf, expert, axis=0), self.weight)
        return jax.vmap(matmul)(x, of_rows)


class Embedding(nnx.Module):
    """A table of `rows` vectors; `logits` uses it as a head. `weight` (rows, D) is a Param or a `Weight`."""

    def __init__(
        self,
        rows: int,
        width: int,
        rngs: nnx.Rngs,
        *,
        axes: tuple[str, str] = ("vocab", "embed"),
        init: Initializer | None = None,
    ):
        self.weight: nnx.Param | Weight = parameter(init or normal(0.02), (rows, width), axes, rngs, weight_decay=True)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Integers [...] -> float32 [..., D]."""
        return take(self.weight, ids)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., rows]."""
        return matmul_transposed(x, self.weight)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last dimension, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, epsilon: float, axis: str = "norm"):
        self.scale = parameter(constant(1.0), (width,), (axis,), rngs)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., D]."""
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon) * self.scale[...]


class LayerNorm(nnx.Module):
    """(x - mean) / std · scale + bias over the last dimension, in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, epsilon: float, axis: str = "norm", bias: bool = True):
        self.scale = parameter(constant(1.0), (width,), (axis,), rngs)
        self.bias = parameter(constant(0.0), (width,), (axis,), rngs) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., D]."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x), -1, keepdims=True)
        y = x * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return y if self.bias is None else y + self.bias[...]


def build_norm(model: ModelConfig, rngs: nnx.Rngs, width: int | None = None) -> RMSNorm | LayerNorm:
    """The norm that the model's configuration names, over its width or another."""
    width = model.width if width is None else width
    if model.norm == "rmsnorm":
        return RMSNorm(width, rngs, epsilon=model.norm_epsilon)
    return LayerNorm(width, rngs, epsilon=model.norm_epsilon, bias=model.norm_bias)
