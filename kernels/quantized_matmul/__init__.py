"""Matmul with a weight of few bits, which is never made dense."""

import functools
import math
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align
from phyla.kernels.dispatch import resolve
from phyla.kernels.quantized_matmul import gpu, reference, tpu, xla
from phyla.kernels.quantized_matmul.codebook import Codebook
from phyla.kernels.quantized_matmul.codes import (
    Codes,
    Int2,
    Int3,
    Int4,
    Int8Groups,
    quantize_codes,
    quantize_int2,
    quantize_int3,
    quantize_int4,
    quantize_ternary,
)
from phyla.kernels.quantized_matmul.formats import (
    Float8,
    Format,
    Int8,
    Outliers,
    quantize_float8,
    quantize_int8,
    quantize_llm_int8,
    quantize_outliers,
)
from phyla.kernels.quantized_matmul.ggml import Ggml
from phyla.kernels.quantized_matmul.ggml_rounding import quantize_ggml
from phyla.kernels.quantized_matmul.nf4 import NF4, quantize_nf4

__all__ = [
    "NF4",
    "Codebook",
    "Codes",
    "Float8",
    "Format",
    "Ggml",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Int8Groups",
    "Outliers",
    "quantize_codes",
    "quantize_float8",
    "quantize_ggml",
    "quantize_int2",
    "quantize_int3",
    "quantize_int4",
    "quantize_int8",
    "quantize_llm_int8",
    "quantize_nf4",
    "quantize_outliers",
    "quantize_ternary",
    "quantized_matmul",
]


def _differentiable(how: ModuleType) -> Callable[..., jax.Array]:
    """`how.product`, with `how.transposed` as the gradient for x."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def multiply(x, w, options):
        return how.product(x, w, **dict(options))

    def forward(x, w, options):
        return multiply(x, w, options), w

    def backward(options, w, g):
        return how.transposed(g, w, **dict(options)), None

    multiply.defvjp(forward, backward)
    return lambda x, w, **options: multiply(x, w, tuple(sorted(options.items())))


IMPLEMENTATIONS = {
    name: _differentiable(how) for name, how in (("reference", reference), ("xla", xla), ("tpu", tpu), ("gpu", gpu))
}


def quantized_matmul(x: jax.Array, w: Format, *, implementation: str | None = None) -> jax.Array:
    """Multiply x by the matrix that `w` stands for; sums are float32, or int32 where both are int8.

    Differentiable in x: dx = dy · w.materialize()ᵀ, also where `w` is dynamic (rounding x then counts as the identity).
    `w` gets no gradient. Neither direction writes the dense matrix.

    Args:
        x: [..., K], float32 or bfloat16.
        w: a format for one matrix [K, N]; where leaves are stacked, scan or vmap.
        implementation: "reference" (dequantize, then float32), "xla" (by blocks of rows), "tpu" or "gpu"
            (dequantized on chip) or None, the best for the backend.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.
    """
    if len(w.shape) != 2:
        raise ValueError(f"quantized_matmul: w stands for {w.shape}; map over all but its last two dimensions")
    K, N = w.shape
    if x.ndim < 1 or x.shape[-1] != K or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"quantized_matmul: x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., K={K}]")
    run = resolve("quantized_matmul", implementation, IMPLEMENTATIONS)
    leaves, tree = jax.tree.flatten(w)
    x_MxK, *leaves = align(x.reshape(math.prod(x.shape[:-1]), K), *leaves)
    return run(x_MxK, jax.tree.unflatten(tree, leaves)).reshape(*x.shape[:-1], N)
