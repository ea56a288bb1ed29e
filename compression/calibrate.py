"""What a text says of each matrix: the second moments of the vectors that it multiplies, in one streaming pass.

The moments Σ xxᵀ over tokens are computed as gradients: each matrix is replaced by one whose derivative they are. So
they come out of scans over layers, recomputed blocks and vmapped experts as every gradient does, summed where layers
share a matrix, and nothing but them is kept between batches.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.compression import matrices
from phyla.kernels.grouped_matmul import grouped_matmul
from phyla.models.language_model import LanguageModel
from phyla.models.weights import Weight, dense_matmul

Moments = dict[tuple[Any, ...], jax.Array]
"""By path, Σ xxᵀ over the vectors x that the matrix [..., K, N] multiplied: float32 [..., K, K]."""


class Moment(nnx.Variable):
    """A place for the gradient, zero."""


class Recorded(Weight):
    """A dense matrix that the derivative by `moment` tells the second moments of its inputs."""

    def __init__(self, dense: jax.Array):
        """Holds a matrix [..., K, N]."""
        self.dense = nnx.Variable(dense)
        self.moment = Moment(jnp.zeros((*dense.shape[:-1], dense.shape[-2])))

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        return self.dense.shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return _recorded(dense_matmul, x, self.dense[...], self.moment[...])

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        return _recorded(grouped_matmul, x, self.dense[...], self.moment[...], sizes)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return self.dense[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recorded(multiply: Callable, x: jax.Array, w: jax.Array, moment: jax.Array, *sizes: jax.Array) -> jax.Array:
    """multiply(x, w, *sizes); the derivative by `moment` is what that by w would be if x were the cotangent."""
    return multiply(x, w, *sizes)


def _forward(multiply, x, w, moment, *sizes):
    return multiply(x, w, *sizes), (x, w, moment, sizes)


def _backward(multiply, saved, g):
    x, w, moment, sizes = saved
    (dx,) = jax.vjp(lambda x: multiply(x, w, *sizes), x)[1](g)
    x = x.astype(jnp.float32)
    (of_x,) = jax.vjp(lambda square: multiply(x, square, *sizes), moment)[1](x)
    return dx, None, of_x, *(None for _ in sizes)


_recorded.defvjp(_forward, _backward)


def moments(model: LanguageModel, batches: Iterable[tuple[jax.Array, jax.Array]]) -> Moments:
    """The moments of every dense matrix that a method may touch, heads left out.

    Args:
        model: stays as it is.
        batches: of tokens and segment numbers, integers [B, T]. Padding would count as any token.
    """
    model = nnx.clone(model)
    paths = _recordable(model)
    for path, value in paths.items():
        matrices.replace(model, path, Recorded(value))
    graphdef, at, rest = nnx.split(model, Moment, ...)

    @jax.jit
    def add(total: nnx.State, rest: nnx.State, tokens: jax.Array, segment_ids: jax.Array) -> nnx.State:
        def anything(at: nnx.State) -> jax.Array:
            return jnp.sum(nnx.merge(graphdef, at, rest).forward(tokens, segment_ids=segment_ids).hidden)

        return jax.tree.map(jnp.add, total, jax.grad(anything)(at))

    total = at
    for tokens, segment_ids in batches:
        total = add(total, rest, tokens, segment_ids)
    return {path[:-1]: value[...] for path, value in nnx.to_flat_state(total)}


def _recordable(model: LanguageModel) -> dict[tuple[Any, ...], jax.Array]:
    return {place.path: place.value[...] for place in matrices.places(model) if place.kind == "matrix"}


def each(one: Callable[..., Any], *stacks: jax.Array) -> Any:
    """`one` of every matrix of the stacks [..., K, N], one after another."""
    for _ in stacks[0].shape[:-2]:
        one = functools.partial(_mapped, one)
    return one(*stacks)


def _mapped(one: Callable[..., Any], *stacks: jax.Array) -> Any:
    return jax.lax.map(lambda of_one: one(*of_one), stacks)
