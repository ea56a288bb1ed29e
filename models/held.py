"""What a model remembers between calls in 8 bits: KV caches and recurrent states; inside a call they are floats.

A state takes the form that it was given in: a mixer's `initial_state` is of floats, `LanguageModel.initial_state` holds
of it what its layers name (`Layer.held`), and each call gives back as codes what it got as codes. A recurrent state is
opened by `phyla.models.cursor.carry` and held again by its block, so its error comes in once a call. Attention adds to
its cache the codes of the new tokens, which see each other as later tokens will see them: in chunks or at once, the
codes are the same.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phyla.kernels.quantized_matmul.formats import nonzero

LARGEST = 127


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("axes",))
@dataclasses.dataclass(frozen=True)
class Held:
    """x ≈ codes · scale, with an error of at most scale / 2."""

    codes: jax.Array
    """int8, of x's shape."""
    scale: jax.Array
    """float32, of size 1 along `axes`."""
    axes: tuple[int, ...]
    """Those that share a scale, counted from the last."""


def hold(x: jax.Array, axes: tuple[int, ...]) -> Held:
    """Rounded to nearest; the largest magnitude along the axes has the code ±127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / LARGEST
    codes = jnp.clip(jnp.round(x / nonzero(scale)), -LARGEST, LARGEST)
    return Held(codes.astype(jnp.int8), scale, axes)


def empty(state: Any, parts: Mapping[str, tuple[int, ...]]) -> Any:
    """An empty state with zeros held in some places, by their paths (`memory.0`), each with the axes of its scales."""

    def of_part(path: tuple, leaf: jax.Array) -> jax.Array | Held:
        axes = parts.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if axes is None:
            return leaf
        shared = [1 if axis - leaf.ndim in axes else size for axis, size in enumerate(leaf.shape)]
        return Held(jnp.zeros(leaf.shape, jnp.int8), jnp.zeros(shared), axes)

    return jax.tree_util.tree_map_with_path(of_part, state)


def floats(state: Any) -> Any:
    """Every number that a state or a part of one stands for."""
    return jax.tree.map(lambda node: node.codes * node.scale if _is_held(node) else node, state, is_leaf=_is_held)


def alike(state: Any, before: Any) -> Any:
    """A state of floats held as the one before is; what is held already stays."""

    def one(before: Any, node: Any) -> Any:
        return hold(node, before.axes) if _is_held(before) and not _is_held(node) else node

    return jax.tree.map(one, before, state, is_leaf=_is_held)


def _is_held(node: Any) -> bool:
    return isinstance(node, Held)
