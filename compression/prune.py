"""Pruning by magnitude: the smallest weights of the matrices become zero. Heads and tables are left alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from phyla.compression import matrices
from phyla.compression.recipes import PruneGroups, PruneSmallest

LEFT = "heads and tables of the vocabulary are not pruned"


def prune_smallest(chosen: list[matrices.Place], recipe: PruneSmallest) -> dict[str, str]:
    """Sets exactly the share of each matrix, or of all together, to zero, in place; returns what it leaves, and why.

    Of a stack, each layer's or expert's matrix is one by itself.
    """
    pruned, left = _matrices(chosen)
    if recipe.together and pruned:
        flat = jnp.concatenate([place.value[...].ravel() for place in pruned])
        ends = np.cumsum([place.value.size for place in pruned])[:-1]
        values = jnp.split(_smallest_to_zero(flat[None], recipe.percent)[0], ends)
    else:
        each = [place.value[...].reshape(-1, math.prod(place.value.shape[-2:])) for place in pruned]
        values = [_smallest_to_zero(w_SxN, recipe.percent) for w_SxN in each]
    for place, w in zip(pruned, values, strict=True):
        place.value[...] = w.reshape(place.value.shape)
    return left


def prune_groups(chosen: list[matrices.Place], recipe: PruneGroups) -> dict[str, str]:
    """Keeps the largest of every group of inputs, in place; returns what it leaves, and why.

    Where the groups do not divide the inputs the last group is shorter, and as many of it stay.
    """
    pruned, left = _matrices(chosen)
    for place in pruned:
        place.value[...] = largest_of_groups(place.value[...], recipe.keep, recipe.group)
    return left


def _matrices(chosen: list[matrices.Place]) -> tuple[list[matrices.Place], dict[str, str]]:
    pruned = [place for place in chosen if place.kind == "matrix"]
    return pruned, {place.name: LEFT for place in chosen if place.kind != "matrix"}


@jax.jit(static_argnums=1)
def _smallest_to_zero(w_SxN: jax.Array, percent: float) -> jax.Array:
    """Of each row; of equals the first go."""
    count = round(percent / 100 * w_SxN.shape[1])
    smallest_SxC = jnp.argsort(jnp.abs(w_SxN), axis=1)[:, :count]
    return w_SxN.at[jnp.arange(len(w_SxN))[:, None], smallest_SxC].set(0)


@jax.jit(static_argnums=(1, 2))
def largest_of_groups(w: jax.Array, keep: int, group: int) -> jax.Array:
    """w [..., K, N] with zeros but for the `keep` largest magnitudes of each `group` consecutive rows of a column."""
    *stack, K, N = w.shape
    padding = [(0, 0)] * len(stack) + [(0, -K % group), (0, 0)]
    magnitude = jnp.pad(jnp.abs(w), padding, constant_values=-1.0).reshape(*stack, -1, group, N)
    rank = jnp.argsort(jnp.argsort(-magnitude, axis=-2), axis=-2)
    kept = (rank < keep).reshape(*stack, -1, N)[..., :K, :]
    return jnp.where(kept, w, 0)
