"""The weights of every matrix, and of every table of the vocabulary, come to share a few values, found by k-means.

Han et al. 2016, Deep Compression (arXiv 1510.00149), section 3, with the initialisation that it found best: linear,
between the least weight and the greatest.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.quantize import inputs_first
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import Codebook
from phyla.kernels.quantized_matmul.packing import pack
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized

ROUNDS = 100
"""At most; it ends when no mean changes."""
MOST = 256
BLOCK = 32
"""Of the sorted weights, whose sum is known."""


@dataclass(frozen=True, kw_only=True)
class Cluster(Rule):
    """Each matrix gets so many values of its own. If it has zeros, one of them is 0, for these alone."""

    values: int

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.values <= MOST or self.values & (self.values - 1):
            nearest = min((2**bits for bits in range(1, 9)), key=lambda power: abs(power - self.values))
            raise UserError(
                f"{self.method}: as many as codes of whole bits have, 2 to {MOST}; nearest: kmeans-{nearest}"
            )

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"kmeans-{self.values}"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left = {}
        for place in chosen:
            dense, axes, turned = inputs_first(place)
            held = jax.eval_shape(functools.partial(cluster, values=self.values), dense)
            if held.nbytes >= dense.nbytes:
                left[place.name] = (
                    f"of {dense.shape[-2]} × {dense.shape[-1]}: its codes and values would not be smaller"
                )
            else:
                held = cluster(dense, values=self.values)
                matrices.replace(model, place.path, Quantized(held, axes, transposed=turned))
        return Applied(model, left)


def _make(found: re.Match, only: str) -> Cluster:
    return Cluster(values=int(found[1]), only=only)


METHODS = {
    "kmeans-16": Method(
        r"kmeans-(\d+)",
        _make,
        "each matrix has 16 (or another power of two up to 256) values, found by k-means; zeros stay zero",
    )
}
"""See `phyla.compression.recipes`."""


@jax.jit(static_argnames="values")
def cluster(w: jax.Array, values: int) -> Codebook:
    """Every matrix [K, N] of w [..., K, N] by itself, one after another."""

    def one(w: jax.Array) -> Codebook:
        w = w.astype(jnp.float32)
        book, codes = kmeans(w, values)
        bits = (values - 1).bit_length()
        return Codebook(codes=pack(codes, bits), book=book, rows=len(w))

    return each(one, w)


def kmeans(w: jax.Array, values: int) -> tuple[jax.Array, jax.Array]:
    """The means, increasing from the first that is not for zeros, and the number of the nearest to each element of w.

    A mean that is nearest to none stays where it is. What a mean is nearest to lies together once the weights are
    sorted, so that a round needs no more than their sums between two places.
    """
    used = jnp.sum(w != 0)
    zeros = used < w.size
    sorted_ = jnp.sort(jnp.where(w == 0, jnp.inf, w).ravel())
    least, most = jnp.where(used > 0, sorted_[0], 0), jnp.where(used > 0, sorted_[used - 1], 0)
    # If there are zeros, the first mean is theirs: out of the way of the others until the end.
    steps = (jnp.arange(values) - zeros) / jnp.maximum(values - 1 - zeros, 1)
    means = jnp.where(steps < 0, -jnp.inf, least + (most - least) * steps)
    between = _sums(jnp.where(jnp.isfinite(sorted_), sorted_, 0))

    def better(found: tuple) -> tuple:
        means, _, rounds = found
        ends = jnp.searchsorted(sorted_, _middles(means), side="right")
        ends = jnp.concatenate([jnp.zeros(1, ends.dtype), ends, used.astype(ends.dtype)[None]])
        count = jnp.diff(ends)
        moved = jnp.where(count > 0, between(ends) / jnp.maximum(count, 1), means)
        return moved, jnp.any(moved != means), rounds + 1

    means, *_ = jax.lax.while_loop(lambda found: found[1] & (found[2] < ROUNDS), better, (means, jnp.bool(True), 0))
    codes = jnp.where(w == 0, 0, jnp.searchsorted(_middles(means), w)).astype(jnp.uint8)
    return jnp.where(jnp.isfinite(means), means, 0), codes


def _middles(means: jax.Array) -> jax.Array:
    return (means[1:] + means[:-1]) / 2


def _sums(of: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A function of places in an array: its sums from each to the next, from sums of blocks and in them.

    The difference of two sums of all before would lose what the few outermost weights add to it.
    """
    of_BxS = jnp.pad(of, (0, -of.size % BLOCK)).reshape(-1, BLOCK)
    whole_B = of_BxS.sum(1)
    inside = (jnp.cumsum(of_BxS, axis=1) - of_BxS).ravel()

    def between(ends: jax.Array) -> jax.Array:
        block, number = ends // BLOCK, jnp.arange(len(whole_B))
        covered = (block[:-1, None] <= number) & (number < block[1:, None])
        return jnp.where(covered, whole_B, 0).sum(1) + jnp.diff(inside.at[ends].get(mode="fill", fill_value=0))

    return between
