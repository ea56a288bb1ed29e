"""All parameters of a model, moved together within a few random directions: θ = θ₀ + P v.

Li et al. 2018, arXiv 1804.08838, equation 2; Aghajanyan et al. 2020, arXiv 2012.13255. What is learned is v, d numbers.
P [D, d] is drawn again from its key wherever it is used, by blocks of rows, and never exists whole; its columns are 1
long, or nearly.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Fixed
from phyla.models.weights import constant, parameter
from phyla.models.wrapped import hadamard

ROWS = 1024
"""Of a dense P that exist at one time."""
AT_ONCE = 1 << 18
"""Rows of Fastfood's P, a few numbers each, that are computed together."""

Path = tuple[Any, ...]


class Subspace(nnx.Module):
    """See above."""

    def __init__(
        self,
        paths: tuple[Path, ...],
        size: int,
        dimension: int,
        projection: Literal["dense", "fastfood"],
        key: jax.Array,
        precise: str,
    ):
        """Begins at v = 0.

        Args:
            paths: of the parameters that it moves; their rows of P follow each other in this order.
            size: D, of all these.
            dimension: d.
            projection: dense, of random signs / √D (O(D d)), or Fastfood (O(D log d)).
            key: of the draws.
            precise: as in `parameter`.
        """
        self.paths, self.size, self.projection = paths, size, projection
        # So that Adam moves a parameter in a step about as far as if it were trained itself.
        rate = math.sqrt(size / dimension)
        self.v = parameter(
            constant(0.0), (dimension,), ("intrinsic",), nnx.Rngs(0), learning_rate=rate, precise=precise
        )
        self.key = Fixed(jax.random.key_data(key), axes=("key",))

    def offset(self) -> jax.Array:
        """P v, float32 [D]."""
        of = signs if self.projection == "dense" else fastfood
        return of(self.v[...], jax.random.wrap_key_data(self.key[...]), self.size)

    def moved(self, model: LanguageModel) -> LanguageModel:
        """A copy of the model, without a subspace, whose parameters are θ₀ + P v."""
        model = nnx.clone(model)
        del model.subspace
        held = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        offset, first = self.offset(), 0
        for path in self.paths:
            variable = held[path]
            variable[...] += offset[first : first + variable.size].reshape(variable.shape)
            first += variable.size
        return model


def signs(v: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """P v for P [size, d] of random signs / √size, whose columns are 1 long."""
    words = -(-len(v) // 32)

    def block(key: jax.Array) -> jax.Array:
        bits = jax.random.bits(key, (ROWS, words, 1), jnp.uint32) >> jnp.arange(32, dtype=jnp.uint32) & 1
        drawn = 1 - 2 * bits.reshape(ROWS, -1)[:, : len(v)].astype(jnp.float32)
        return jnp.matmul(drawn, v, precision=jax.lax.Precision.HIGHEST)

    return _by_blocks(block, key, size, ROWS, 1) / math.sqrt(size)


def fastfood(v: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """P v for P of blocks H G Π H B (Le et al. 2013, section 3; Aghajanyan et al. 2020, equation 2).

    Every block has as many rows as the next power of two n ≥ d, to which v is filled with zeros: a Hadamard matrix H,
    signs B and normal numbers G drawn for it alone, and a permutation Π that all share (to draw one is to sort). As
    large as `signs`.
    """
    n = 1 << (len(v) - 1).bit_length()
    filled = jnp.pad(v, (0, n - len(v)))
    for_order, for_blocks = jax.random.split(key)
    order = jax.random.permutation(for_order, n)

    def block(key: jax.Array) -> jax.Array:
        for_B, for_G = jax.random.split(key)
        B = jax.random.rademacher(for_B, (n,), jnp.float32)
        G = jax.random.normal(for_G, (n,))
        return hadamard(hadamard(B * filled)[order] * G) * jax.lax.rsqrt(jnp.sum(jnp.square(G)))

    return _by_blocks(block, for_blocks, size, n, max(1, AT_ONCE // n)) * (n / math.sqrt(size))


def _by_blocks(block: Callable[[jax.Array], jax.Array], key: jax.Array, size: int, rows: int, at_once: int) -> Any:
    """Blocks of so many rows, each of its own key, one after the other; the backward pass draws them again."""
    count = -(-size // rows)
    found = jax.lax.map(jax.checkpoint(block), jax.random.split(key, count), batch_size=min(at_once, count))
    return found.reshape(-1)[:size]
