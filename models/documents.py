"""A model on every document of packed rows by itself, where each begins with more than nothing.

An op begins a document with zeros, and only what goes before a row's first token is given to it. So a model with a
learned beginning reads the first document of every row, then the second of every row, … : whatever its layers are, each
document is what it would be alone, to the gradients. The passes are as many as the documents of the fullest row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from phyla.kernels.segments import starts


def apart(
    run: Callable[[Any, Any, jax.Array], tuple[Any, Any]], args: Any, inputs: Any, segment_ids: jax.Array
) -> tuple[Any, Any]:
    """What `run` makes of each document alone.

    Args:
        run: (args, inputs, segment_ids) -> (arrays [B, T, …], arrays of any shape). Each row holds one document, at its
            beginning, as segment 1, with padding behind it, or nothing but padding.
        args: arrays that it depends on, which are differentiated.
        inputs: arrays [B, T, …] with the tokens of the documents, which are not.
        segment_ids: [B, T], a number for each document; 0: padding.

    Returns:
        Of the first arrays of `run` each document's part in its place, zeros for padding; of the others the sum.
    """
    T, begins_BxT = segment_ids.shape[1], starts(segment_ids).at[:, 0].set(True)
    real_BxT = segment_ids != 0
    number_BxT = jnp.where(real_BxT, jnp.cumsum(begins_BxT & real_BxT, axis=1) - 1, -1)

    def one(number: jax.Array, given: tuple[Any, Any, jax.Array]) -> tuple[Any, Any]:
        args, inputs, number_BxT = given
        here_BxT = number_BxT == number
        first_Bx1 = jnp.argmax(here_BxT, axis=1, keepdims=True)

        def turned(x: jax.Array, by_Bx1: jax.Array) -> jax.Array:
            index_BxT = (jnp.arange(T) + by_Bx1) % T
            return jnp.take_along_axis(x, index_BxT.reshape(*index_BxT.shape, *(1,) * (x.ndim - 2)), axis=1)

        def placed(x: jax.Array) -> jax.Array:
            return jnp.where(here_BxT.reshape(*here_BxT.shape, *(1,) * (x.ndim - 2)), turned(x, -first_Bx1), 0)

        found, sums = run(
            args, jax.tree.map(lambda x: turned(x, first_Bx1), inputs), turned(here_BxT, first_Bx1).astype(jnp.int32)
        )
        return jax.tree.map(placed, found), sums

    return total(one, (args, inputs, number_BxT), jnp.max(number_BxT) + 1)


def total(term: Callable[[jax.Array, Any], Any], args: Any, count: jax.Array) -> Any:
    """Σ term(i, args) for i < count, a number that only the device knows. The derivative computes each term again.

    Only one term's intermediate values exist at a time, and nothing is computed for arguments without a derivative.
    """
    leaves, structure = jax.tree.flatten(args)

    def of(i: jax.Array, leaves: list[jax.Array]) -> Any:
        return term(i, jax.tree.unflatten(structure, leaves))

    @jax.custom_vjp
    def whole(leaves: list[jax.Array], count: jax.Array) -> Any:
        return _added(lambda i: of(i, leaves), count)

    def forward(leaves: list[Any], count: Any) -> tuple[Any, tuple]:
        moves = [leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact) for leaf in leaves]
        moved = [leaf.value if moving else None for leaf, moving in zip(leaves, moves, strict=True)]
        fixed = [None if moving else leaf.value for leaf, moving in zip(leaves, moves, strict=True)]
        return whole([leaf.value for leaf in leaves], count.value), (moved, fixed, count.value)

    def backward(kept: tuple, given: Any) -> tuple[list[Any], None]:
        moved, fixed, count = kept
        symbolic = lambda node: isinstance(node, SymbolicZero)  # noqa: E731
        g = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if symbolic(x) else x, given, is_leaf=symbolic)

        def one(i: jax.Array) -> list[Any]:
            def again(moved: list[Any]) -> Any:
                return of(i, [b if a is None else a for a, b in zip(moved, fixed, strict=True)])

            return jax.vjp(again, moved)[1](g)[0]

        return _added(one, count), None

    whole.defvjp(forward, backward, symbolic_zeros=True)
    return whole(leaves, count)


def _added(term: Callable[[jax.Array], Any], count: jax.Array) -> Any:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(term, jnp.zeros((), jnp.int32)))
    return jax.lax.fori_loop(0, count, lambda i, sums: jax.tree.map(jnp.add, sums, term(i)), zeros)
