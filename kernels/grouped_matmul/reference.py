"""Grouped matmul, the specification: every row by every matrix, and a mask."""

import jax
import jax.numpy as jnp


def product(x, weight, sizes, *, transpose=False):
    """In float32, or float64 if x is."""
    if transpose:
        weight = jnp.swapaxes(weight, 1, 2)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    every_ExNxO = jnp.einsum("ni,eio->eno", x.astype(dtype), weight.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("eno,en->no", every_ExNxO, _members(x, sizes, dtype)).astype(x.dtype)


def weight_gradient(x, g, sizes):
    """xᵀ g over the rows of each group, [E, I, O] in float32 (or float64)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    members_ExN = _members(x, sizes, dtype)
    arrays = members_ExN, x.astype(dtype), g.astype(dtype)
    return jnp.einsum("en,ni,no->eio", *arrays, precision=jax.lax.Precision.HIGHEST)


def _members(x, sizes, dtype):
    ends_E = jnp.cumsum(sizes)
    rows_N = jnp.arange(x.shape[0])
    return ((rows_N >= (ends_E - sizes)[:, None]) & (rows_N < ends_E[:, None])).astype(dtype)
