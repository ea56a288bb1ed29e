"""State-space duality: a linear recurrence with one decay a head, that of Mamba-2 and Mamba-3."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.ssd.gpu import ssd_gpu
from phyla.kernels.ssd.reference import ssd_reference
from phyla.kernels.ssd.tpu import ssd_tpu
from phyla.kernels.ssd.xla import ssd_xla

IMPLEMENTATIONS = {"reference": ssd_reference, "xla": ssd_xla, "tpu": ssd_tpu, "gpu": ssd_gpu}


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run a state-space model whose state, a matrix for each head, decays by one number a head and token.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'
        y_t = h_t C_t + D x_t

    with h_t of shape [P, N], x_t a vector of P and B_t, C_t vectors of N, which H / G successive heads share. Inputs
    are float32 or bfloat16; state and sums are float32. Differentiable in every floating argument, through both
    results. Results are finite for dt in [0, 1e30] and A in [-1e30, 0] as long as dt B x, its sums and their
    gradients are.

    Args:
        x: input, [B, T, H, P] with T >= 1.
        dt: step size in units of 1/|A|, [B, T, H], >= 0 (the caller has applied softplus).
        A: decay rates <= 0, one a head [H], or one a head and token [B, T, H] (Mamba-3).
        B: input map, [B, T, G, N]; G divides H, and head i belongs to group i // (H / G).
        C: output map, [B, T, G, N].
        D: direct connection from x to y, [H]; None is zero.
        initial_state: h before the first token, [B, H, P, N]; None is zeros. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is zero at the start of every token whose id differs from that of
            the token before it.
        implementation: "reference", "xla", "tpu", "gpu" or None, the best for the backend.

    Returns:
        y, [B, T, H, P] in the dtype of x, and the state after the last token, float32 [B, H, P, N].
        ("reference" computes in float64 when x is float64; the others refuse it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060), section 6 and listing 1.
    """
    check(
        "ssd",
        x=(x, "B T H P"),
        dt=(dt, "B T H"),
        A=(A, "H" if A.ndim == 1 else "B T H"),
        B=(B, "B T G N"),
        C=(C, "B T G N"),
        D=(D, "H"),
        initial_state=(initial_state, "B H P N"),
        segment_ids=(segment_ids, "B T"),
    )
    heads, groups = x.shape[2], B.shape[2]
    if heads % groups:
        raise ValueError(f"ssd: {groups} groups of B do not divide {heads} heads of x")
    run = resolve("ssd", implementation, IMPLEMENTATIONS)
    state_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[3]), state_dtype)
    if D is None:
        D = jnp.zeros((heads,), state_dtype)
    # Of 1e30 × 1e30, the largest float: it decays to zero as surely.
    log_decay = jnp.maximum(dt.astype(state_dtype) * A.astype(state_dtype), jnp.finfo(state_dtype).min)
    arrays = align(x, dt, log_decay, B, C, D, initial_state.astype(state_dtype))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(*arrays, resets)
