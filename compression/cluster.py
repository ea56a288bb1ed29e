"""The weights of every matrix, and of every table of the vocabulary, come to share a few values, found by k-means.

Han et al. 2016, Deep Compression (arXiv 1510.00149), section 3, with the initialisation that it found best: linear,
between the least weight and the greatest.
"""

import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import Codebook
from phyla.kernels.quantized_matmul.packing import pack
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized

ROUNDS = 100
"""At most; it ends when no mean changes."""
MOST = 256


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
            turned = place.kind in ("table", "values")  # whose rows are looked up, or cut
            dense, axes = place.value[...], place.axes
            if turned:
                dense, axes = dense.swapaxes(-1, -2), (*axes[:-2], axes[-1], axes[-2])
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

    A mean that is nearest to none stays where it is.
    """
    used = w != 0
    zeros = ~jnp.all(used)
    least, most = jnp.min(jnp.where(used, w, jnp.inf)), jnp.max(jnp.where(used, w, -jnp.inf))
    least, most = (jnp.where(jnp.any(used), edge, 0) for edge in (least, most))
    # If there are zeros, the first mean is theirs: out of the way of the others until the end.
    steps = (jnp.arange(values) - zeros) / (values - 1 - zeros)
    means = jnp.where(steps < 0, -jnp.inf, least + (most - least) * steps)

    def nearest(means: jax.Array) -> jax.Array:
        found = jnp.searchsorted((means[1:] + means[:-1]) / 2, w).astype(jnp.uint8)
        return jnp.where(used, found, 0)

    def better(found: tuple) -> tuple:
        means, codes, _, rounds = found
        count, total = _sums(codes, jnp.ones_like(w)), _sums(codes, w)
        moved = jnp.where((count > 0) & jnp.isfinite(means), total / jnp.maximum(count, 1), means)
        return moved, nearest(moved), jnp.any(moved != means), rounds + 1

    def _sums(codes: jax.Array, of: jax.Array) -> jax.Array:
        """By row first: sums of many numbers one by one are not exact in float32."""
        return jax.vmap(lambda codes, of: jnp.zeros(values).at[codes].add(of))(codes, of).sum(0)

    start = means, nearest(means), jnp.bool(True), 0
    means, codes, *_ = jax.lax.while_loop(lambda found: found[2] & (found[3] < ROUNDS), better, start)
    return jnp.where(jnp.isfinite(means), means, 0), codes
