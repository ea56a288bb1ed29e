"""Grouped matmul: consecutive rows of one array, each group times its own matrix (a mixture's experts)."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.grouped_matmul import ragged, reference, xla


def _differentiable(how: ModuleType) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`how.product`, with the gradients made of `how.product` and `how.weight_gradient`."""

    @jax.custom_vjp
    def grouped(x, weight, sizes):
        return how.product(x, weight.astype(x.dtype), sizes)

    def forward(x, weight, sizes):
        return grouped(x, weight, sizes), (x, weight, sizes)

    def backward(saved, g):
        x, weight, sizes = saved
        dx = how.product(g, weight.astype(x.dtype), sizes, transpose=True)
        return dx, how.weight_gradient(x, g, sizes).astype(weight.dtype), None

    grouped.defvjp(forward, backward)
    return grouped


RAGGED = _differentiable(ragged)
IMPLEMENTATIONS = {
    "reference": _differentiable(reference),
    "xla": _differentiable(xla),
    "ragged": RAGGED,
    "tpu": RAGGED,
    "gpu": RAGGED,
}


def grouped_matmul(
    x: jax.Array, weight: jax.Array, sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiply the first sizes[0] rows of x by weight[0], the next sizes[1] by weight[1], and so on.

    Products are accumulated in float32. Differentiable in x and weight; the gradient of weight is accumulated and
    returned in float32 if weight is. Rows after the last group give zeros and take part in no gradient.

    Args:
        x: [N, I] with N >= 1, float32 or bfloat16.
        weight: [E, I, O]; cast to the dtype of x.
        sizes: rows of each group, integers [E] >= 0 with a sum of at most N.
        implementation: "reference", "xla" (tiles of one group, only as many as there are rows: for CPUs), "ragged"
            (`jax.lax.ragged_dot`: for accelerators; on a CPU it multiplies every row by every matrix) or None, the
            best for the backend.

    Returns:
        [N, O] in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: the grouped matrix product of Gale et al., MegaBlocks (arXiv 2211.15841), section 5.
    """
    check("grouped_matmul", x=(x, "N I"), weight=(weight, "E I O"))
    if sizes.shape != weight.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: sizes is {sizes.dtype} {sizes.shape}, expected integers [E={len(weight)}]")
    return resolve("grouped_matmul", implementation, IMPLEMENTATIONS)(*align(x, weight, sizes))
