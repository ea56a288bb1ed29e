"""Learned matrices: how one is made, and the contract of the objects that can stand in for one.

Every learned matrix is used through `Linear` or `Embedding` (`phyla.models.layers`), whose `weight` is a `Param` or a
`Weight`: an object that knows how to multiply. Compression swaps one for the other; no architecture knows of it.
"""

import abc
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.grouped_matmul import grouped_matmul

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def parameter(
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    rngs: nnx.Rngs,
    *,
    weight_decay: bool = False,
    matrix: bool = False,
    learning_rate: float = 1.0,
    share: float = 1.0,
    precise: str = "",
) -> nnx.Param:
    """A float32 parameter and what the rest of the house needs to know of it.

    Args:
        init: `init(key, shape) -> array`.
        shape: its shape.
        axes: a logical name for each dimension; `phyla.training.sharding` maps them to mesh axes.
        rngs: the stream `params` is used.
        weight_decay: whether the optimizer decays it (matrices yes; norms, biases, A_log, D no).
        matrix: whether it multiplies activations from the right, (in, out); Muon orthogonalises these.
        learning_rate: multiplies the optimizer's learning rate.
        share: the part of it that a token uses (of a mixture's experts, those chosen).
        precise: why compression leaves this matrix as it is; empty: it need not. What is neither a matrix nor a table
            of the vocabulary stays as it is anyway.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} do not name the dimensions of shape {shape}")
    return nnx.Param(
        init(rngs.params(), shape).astype(jnp.float32),
        axes=axes,
        weight_decay=weight_decay,
        matrix=matrix,
        learning_rate=learning_rate,
        share=share,
        precise=precise,
    )


def trainable(path: tuple, variable: nnx.Variable) -> bool:
    """A filter for `nnx.split`: the parameters that training changes, all but those that `freeze` has marked."""
    return isinstance(variable, nnx.Param) and variable.get_metadata().get("trainable", True)


def freeze(model: nnx.Module) -> None:
    """Marks every parameter that the model has now as one that training leaves as it is."""
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_metadata(trainable=False)


def unfreeze(model: nnx.Module) -> None:
    """Undoes `freeze`."""
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_metadata(trainable=True)


def normal(std: float) -> Initializer:
    """Normal with a fixed standard deviation."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def fan_in(scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / √(first dimension)."""
    return lambda key, shape: scale / math.sqrt(shape[0]) * jax.random.normal(key, shape)


def uniform(bound: float) -> Initializer:
    """Uniform from -bound to bound."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def orthogonal(gain: float = 1.0) -> Initializer:
    """Orthonormal rows or columns, whichever are fewer, times gain."""
    return lambda key, shape: jax.nn.initializers.orthogonal(gain)(key, shape)


def taps(count: int) -> Initializer:
    """For the weights and biases of a depthwise convolution: PyTorch's default, with which all who use one train."""
    return uniform(count**-0.5)


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return lambda key, shape: jnp.full(shape, value)


class Weight(nnx.Module, abc.ABC):
    """A matrix of shape (in, out) held in another form than one dense array.

    Where several are stacked (over layers or experts), all leaves are, and the methods are for scan or vmap.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(…, in, out), with the dimensions over which it is stacked."""

    @property
    def nbytes(self) -> int:
        """Of everything that it holds: codes, scales, indices."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of everything that it holds over the elements of the dense matrix."""
        return 8 * self.nbytes / math.prod(self.shape)

    @abc.abstractmethod
    def matmul(self, x: jax.Array) -> jax.Array:
        """x [..., in] times the matrix, [..., out], in x's dtype."""

    @abc.abstractmethod
    def materialize(self) -> jax.Array:
        """The dense float32 matrix, [in, out]."""

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Of a stack [E, in, out]: x [N, in], each row times its group's matrix, [N, out]; see `ExpertLinear`."""
        return grouped_matmul(x, materialize(self), sizes)

    def take(self, rows: jax.Array) -> jax.Array:
        """Rows of the matrix, float32 [..., out], by their numbers, integers [...]."""
        return jnp.take(self.materialize(), rows, axis=0)

    def matmul_transposed(self, x: jax.Array) -> jax.Array:
        """x [..., out] times the transposed matrix, float32 [..., in]."""
        return _dense_transposed(x, self.materialize())


def matmul(x: jax.Array, weight: nnx.Param | Weight) -> jax.Array:
    """x [..., in] times weight [in, out], in x's dtype."""
    return weight.matmul(x) if isinstance(weight, Weight) else dense_matmul(x, weight[...])


def grouped(x: jax.Array, weight: nnx.Param | Weight, sizes: jax.Array) -> jax.Array:
    """x [N, in] times weight [E, in, out], each row its group's matrix: [N, out] in x's dtype; see `ExpertLinear`."""
    return weight.grouped_matmul(x, sizes) if isinstance(weight, Weight) else grouped_matmul(x, weight[...], sizes)


def group_of_rows(sizes: jax.Array, rows: int) -> jax.Array:
    """The number of each row's group, integers [rows], where groups of `sizes` [E] follow each other; E after them."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


def materialize(weight: nnx.Param | Weight) -> jax.Array:
    """The dense float32 matrix, or all of a stack, [..., in, out]."""
    if not isinstance(weight, Weight):
        return weight[...]
    one = type(weight).materialize
    for _ in weight.shape[:-2]:
        one = jax.vmap(one)
    return one(weight)


def take(weight: nnx.Param | Weight, rows: jax.Array) -> jax.Array:
    """Rows of the matrix, float32 [..., out], by their numbers, integers [...]."""
    return weight.take(rows) if isinstance(weight, Weight) else jnp.take(weight[...], rows, axis=0)


def matmul_transposed(x: jax.Array, weight: nnx.Param | Weight) -> jax.Array:
    """x [..., out] times the transposed weight [in, out], float32 [..., in]."""
    return weight.matmul_transposed(x) if isinstance(weight, Weight) else _dense_transposed(x, weight[...])


def _dense_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...o,io->...i", x, w.astype(x.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp)
def dense_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] @ w [in, out] in x's dtype, accumulated in float32.

    The gradient of w is computed as xᵀg in w's own layout: autodiff's (gᵀx)ᵀ is slow on the CPU.
    """
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def _matmul_fwd(x, w):
    return dense_matmul(x, w), (x, w)


def _matmul_bwd(residuals, g):
    x, w = residuals
    dx = jnp.matmul(g, w.astype(x.dtype).T, preferred_element_type=jnp.float32).astype(x.dtype)
    rows = math.prod(x.shape[:-1])
    dw = jnp.matmul(x.reshape(rows, -1).T, g.reshape(rows, -1), preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


dense_matmul.defvjp(_matmul_fwd, _matmul_bwd)
