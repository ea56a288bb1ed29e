"""Selective scan, the recurrence of Mamba-1."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.selective_scan.gpu import selective_scan_gpu
from phyla.kernels.selective_scan.reference import selective_scan_reference
from phyla.kernels.selective_scan.tpu import selective_scan_tpu
from phyla.kernels.selective_scan.xla import selective_scan_xla

IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
    "tpu": selective_scan_tpu,
    "gpu": selective_scan_gpu,
}


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run a diagonal state-space model whose step size, input and output maps depend on the token.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t = C_t . h_t + D x_t

    for every channel d of D on its own, with h_t a vector of N numbers per channel. Inputs are float32 or
    bfloat16; state and sums are float32. Differentiable in every floating argument, through both results. Results
    are finite for dt in [0, 1e30] and A in [-1e30, 0] as long as dt B x, its sums and their gradients are ("tpu" takes
    what of dt x, B, C and the gradient of y is above 1e15 for 1e15).

    Args:
        x: input, [B, T, D] with T >= 1.
        dt: step size in units of 1/|A|, [B, T, D], >= 0 (the caller has applied softplus).
        A: decay rates, [D, N], <= 0.
        B: input map, [B, T, N].
        C: output map, [B, T, N].
        D: direct connection from x to y, [D].
        initial_state: h before the first token, [B, D, N]; None is zeros. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is zero at the start of every token whose id differs from that of
            the token before it.
        implementation: "reference", "xla", "tpu", "gpu" or None, the best for the backend.

    Returns:
        y, [B, T, D] in the dtype of x, and the state after the last token, float32 [B, D, N].
        ("reference" computes in float64 when x is float64; the others refuse it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: Gu and Dao, Mamba (arXiv 2312.00752), equation 2 with the discretisation of section 3.2 as implemented
    by the authors: exp(dt A) for A and dt B (Euler) for B.
    """
    check(
        "selective_scan",
        x=(x, "B T D"),
        dt=(dt, "B T D"),
        A=(A, "D N"),
        B=(B, "B T N"),
        C=(C, "B T N"),
        D=(D, "D"),
        initial_state=(initial_state, "B D N"),
        segment_ids=(segment_ids, "B T"),
    )
    run = resolve("selective_scan", implementation, IMPLEMENTATIONS)
    state_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), state_dtype)
    arrays = align(x, dt, A, B, C, D, initial_state.astype(state_dtype))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(*arrays, resets)
