"""Quantized matmul, the specification: the whole matrix, then multiply in float32."""

import jax
import jax.numpy as jnp

from phyla.kernels.quantized_matmul.formats import Outliers, rounded_like_weights


def product(x, w):
    """X [M, K] by the matrix that `w` stands for."""
    if isinstance(w, Outliers):
        inner = product(x.at[:, w.columns].set(0, mode="drop").astype(jnp.float32), w.body)
        outer = x.at[:, w.columns].get(mode="fill", fill_value=0)
        return (inner + _dot(outer, w.values)).astype(x.dtype)
    return _dot(rounded_like_weights(x, w), w.materialize()).astype(x.dtype)


def transposed(g, w):
    """G [M, N] by the transposed matrix."""
    return _dot(g, w.materialize().T).astype(g.dtype)


def _dot(a, b):
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
