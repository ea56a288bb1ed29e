"""What a text says of each matrix: figures of the vectors that it multiplies, in one streaming pass.

Sums over tokens are computed as gradients: each matrix is replaced by one whose derivative they are. So they come out
of scans over layers, recomputed blocks and vmapped experts as every gradient does, summed where layers share a matrix,
and nothing but them is kept between batches. A maximum takes the same way: it is exact where a call of the model uses a
matrix once, and where layers share one, the sum of the maxima of its uses, which is a bound.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.compression import matrices
from phyla.kernels.grouped_matmul import grouped_matmul
from phyla.models.language_model import LanguageModel
from phyla.models.weights import Weight, dense_matmul, group_of_rows

Path = tuple[Any, ...]

OUTLIER = 6.0
"""A magnitude from which an activation is one (Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 3.2)."""


class Columns(NamedTuple):
    """Of each element of the vectors that a matrix [..., K, N] multiplied, over tokens: float32 [..., K]."""

    size: jax.Array
    """Σ |x|."""
    square: jax.Array
    """Σ x²."""
    fourth: jax.Array
    """Σ x⁴."""
    outliers: jax.Array
    """How often |x| was at least `OUTLIER`."""
    tokens: jax.Array
    """How many."""
    largest: jax.Array
    """The maximum of |x|; see above."""


@jax.tree_util.register_pytree_node_class
class Moments(dict[Path, jax.Array]):
    """By path, Σ xxᵀ over the vectors x that the matrix [..., K, N] multiplied: float32 [..., K, K]."""

    def __init__(self, moments: dict[Path, jax.Array] | None = None, columns: dict[Path, Columns] | None = None):
        """Holds the moments, none if no recipe needs them, and the `Columns` of the same matrices."""
        super().__init__(moments or {})
        self.columns = columns or {}

    def tree_flatten(self) -> tuple[tuple[dict[Path, jax.Array], dict[Path, Columns]], None]:
        """Of a pytree."""
        return (dict(self), self.columns), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[dict[Path, jax.Array], dict[Path, Columns]]) -> "Moments":
        """Of a pytree."""
        return cls(*children)


SUMS, FIGURES = 5, len(Columns._fields)


class Told(nnx.Variable):
    """A place for the gradient, zero: the figures in rows, [..., FIGURES, K], then moments if asked for."""


class Recorded(Weight):
    """A dense matrix that the derivative by `told` tells of its inputs."""

    def __init__(self, dense: jax.Array, squares: bool):
        """Holds a matrix [..., K, N]; `squares`: tells second moments too."""
        *stack, K, _ = dense.shape
        self.dense = nnx.Variable(dense)
        self.told = Told(jnp.zeros((*stack, FIGURES + K * squares, K)))

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        return self.dense.shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return _recorded(dense_matmul, x, self.dense[...], self.told[...])

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        return _recorded(grouped_matmul, x, self.dense[...], self.told[...], sizes)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        return self.dense[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recorded(multiply: Callable, x: jax.Array, w: jax.Array, told: jax.Array, *sizes: jax.Array) -> jax.Array:
    """multiply(x, w, *sizes); the derivative by `told` tells of x, whatever the cotangent is; those by others are 0."""
    return multiply(x, w, *sizes)


def _forward(multiply, x, w, told, *sizes):
    return multiply(x, w, *sizes), (x, told, sizes)


def _backward(multiply, saved, g):
    given, told, sizes = saved
    *stack, rows, K = told.shape
    x = given.astype(jnp.float32)

    def summed(a: jax.Array, b: jax.Array) -> jax.Array:
        """Σ aᵀb, of each matrix: what the derivative by it would be if b were the cotangent of its product with a."""
        zeros = jnp.zeros((*stack, a.shape[-1], b.shape[-1]))
        return jax.vjp(lambda w: multiply(a, w, *sizes), zeros)[1](b)[0]

    size, square = jnp.abs(x), jnp.square(x)
    figures = (size, square, jnp.square(square), (size >= OUTLIER).astype(jnp.float32), jnp.ones_like(x))
    sums = summed(jnp.ones((*x.shape[:-1], 1)), jnp.concatenate(figures, axis=-1)).reshape(*stack, SUMS, K)
    parts = [sums, _largest(size, *sizes)]
    if rows > FIGURES:
        parts.append(summed(x, x))
    # No figure depends on a cotangent, so that none is led back: that would be as much work again as the forward pass.
    return jnp.zeros_like(given), None, jnp.concatenate(parts, axis=-2), *(None for _ in sizes)


_recorded.defvjp(_forward, _backward)


def _largest(size: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
    """Over all vectors [1, K], or over those of each group [E, 1, K]."""
    if sizes is None:
        return jnp.max(size.reshape(-1, size.shape[-1]), axis=0, keepdims=True)
    group = group_of_rows(sizes, len(size))
    return jnp.maximum(jax.ops.segment_max(size, group, num_segments=len(sizes)), 0)[:, None]


def moments(model: LanguageModel, batches: Iterable[tuple[jax.Array, jax.Array]], squares: bool = True) -> Moments:
    """The figures of every dense matrix that a method may touch, heads left out.

    Each token is read once, so a learned beginning, which every document has to itself, is left out.

    Args:
        model: stays as it is.
        batches: of tokens and segment numbers, integers [B, T]. Padding would count as any token.
        squares: whether second moments are kept, K numbers for each of the others.
    """
    model = nnx.clone(model)
    if model.beginning is not None:
        del model.beginning
    paths = _recordable(model).items()
    asked = {matrices.replace(model, path, Recorded(value, squares)): path for path, value in paths}
    graphdef, at, rest = nnx.split(model, Told, ...)

    @jax.jit
    def add(total: nnx.State, rest: nnx.State, tokens: jax.Array, segment_ids: jax.Array) -> nnx.State:
        def anything(at: nnx.State) -> jax.Array:
            return jnp.sum(nnx.merge(graphdef, at, rest).forward(tokens, segment_ids=segment_ids).hidden)

        return jax.tree.map(_joined, total, jax.grad(anything)(at))

    total = at
    for tokens, segment_ids in batches:
        total = add(total, rest, tokens, segment_ids)
    return _taken({asked[path[:-1]]: value[...] for path, value in nnx.to_flat_state(total)})


def _joined(total: jax.Array, new: jax.Array) -> jax.Array:
    largest = jnp.maximum(total[..., SUMS, :], new[..., SUMS, :])
    return (total + new).at[..., SUMS, :].set(largest)


def _taken(told: dict[Path, jax.Array]) -> Moments:
    columns = {path: Columns(*(rows[..., i, :] for i in range(FIGURES))) for path, rows in told.items()}
    squares = {path: rows[..., FIGURES:, :] for path, rows in told.items() if rows.shape[-2] > FIGURES}
    return Moments(squares, columns)


def _recordable(model: LanguageModel) -> dict[Path, jax.Array]:
    return {place.path: place.value[...] for place in matrices.places(model) if place.kind == "matrix"}


def each(one: Callable[..., Any], *stacks: jax.Array) -> Any:
    """`one` of every matrix of the stacks [..., K, N], one after another."""
    for _ in stacks[0].shape[:-2]:
        one = functools.partial(_mapped, one)
    return one(*stacks)


def _mapped(one: Callable[..., Any], *stacks: jax.Array) -> Any:
    return jax.lax.map(lambda of_one: one(*of_one), stacks)
