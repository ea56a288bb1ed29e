"""Grouped matmul by `jax.lax.ragged_dot`, which TPUs and GPUs have kernels for."""

import jax
import jax.numpy as jnp

CONTRACT_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def product(x, weight, sizes, *, transpose=False):
    """See `grouped_matmul`; by the transposed matrices if `transpose`."""
    if transpose:
        weight = jnp.swapaxes(weight, 1, 2)
    return _product(x, weight, sizes.astype(jnp.int32)).astype(x.dtype)


def weight_gradient(x, g, sizes):
    """xᵀ g over the rows of each group, float32 [E, I, O]."""
    return _weight_gradient(x, g, sizes.astype(jnp.int32))


# JAX has no batching rule for a weight that is not batched.
@jax.custom_batching.sequential_vmap
def _product(x, weight, sizes):
    return jax.lax.ragged_dot(x, weight, sizes, preferred_element_type=jnp.float32)


@jax.custom_batching.sequential_vmap
def _weight_gradient(x, g, sizes):
    return jax.lax.ragged_dot_general(x, g, sizes, CONTRACT_ROWS, preferred_element_type=jnp.float32)
