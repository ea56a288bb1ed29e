"""Layers of xLSTM that keep heads, or smaller groups of channels, apart: a block-diagonal map and a norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.weights import Initializer, Weight, constant, matmul, parameter


class HeadwiseLinear(nnx.Module):
    """A block-diagonal square matrix: each of `groups` groups of channels is mapped by itself.

    `weight` is a Param [groups, width / groups, width / groups] (in before out), or a `Weight` stacked over groups.
    """

    def __init__(self, groups: int, width: int, rngs: nnx.Rngs, *, init: Initializer, bias: bool = False):
        blocks, axes = (groups, width // groups, width // groups), ("inner", "block", "block_out")
        self.weight: nnx.Param | Weight = parameter(init, blocks, axes, rngs, weight_decay=True, matrix=True)
        self.bias = parameter(constant(0.0), (width,), ("inner",), rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        # In float32: small blocks are bound by memory, and XLA:CPU has no batched product of bfloat16 into float32.
        x_NxGxI = x.reshape(-1, *self.weight.shape[:2]).astype(jnp.float32)
        if isinstance(self.weight, Weight):
            y_NxGxO = jax.vmap(matmul, in_axes=(1, 0), out_axes=1)(x_NxGxI, self.weight)
        else:
            y_NxGxO = jnp.einsum("ngi,gio->ngo", x_NxGxI, self.weight[...])
        y = y_NxGxO.astype(x.dtype).reshape(x.shape)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class HeadNorm(nnx.Module):
    """LayerNorm of every head by itself, in float32, with a scale for every channel and no bias."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, epsilon: float):
        self.scale = parameter(constant(1.0), (width,), ("inner",), rngs)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H, P] -> float32 [..., H P]."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        return x.reshape(*x.shape[:-2], -1) * self.scale[...]
