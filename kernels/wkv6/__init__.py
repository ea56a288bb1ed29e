"""WKV-6, the recurrence of RWKV-6: linear attention whose decay depends on token and channel."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.wkv6.reference import wkv6_reference
from phyla.kernels.wkv6.xla import wkv6_xla

IMPLEMENTATIONS = {"reference": wkv6_reference, "xla": wkv6_xla}


def wkv6(
    r: jax.Array,
    w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    u: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run linear attention with a decay for each token and channel, and a bonus for the present token.

        y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
        S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t

    for every head of H on its own, with S a matrix of K rows and V columns, and r, k, v rows. Inputs are float32 or
    bfloat16; state and sums are float32. Differentiable in every floating argument, through both results. Every exp
    is of a sum of some w, so that results are finite for any w in [-1e30, 0] as long as r, k, v and their products are.

    Args:
        r: receptance (the query), [B, T, H, K] with T >= 1.
        w: log of the decay, [B, T, H, K], <= 0 (the caller has applied -exp).
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        u: bonus of the present token, [H, K].
        initial_state: S before the first token, [B, H, K, V]; None is zeros. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is zero at the start of every token whose id differs from that of
            the token before it.
        implementation: "reference", "xla" or None, the best for the backend.

    Returns:
        y, [B, T, H, V] in the dtype of v, and S after the last token, float32 [B, H, K, V].
        ("reference" computes in float64 when v is float64; "xla" refuses it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: Peng et al., Eagle and Finch (arXiv 2404.05892), the time mixing of Finch.
    """
    check(
        "wkv6",
        r=(r, "B T H K"),
        w=(w, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        u=(u, "H K"),
        initial_state=(initial_state, "B H K V"),
        segment_ids=(segment_ids, "B T"),
    )
    run = resolve("wkv6", implementation, IMPLEMENTATIONS)
    state_dtype = jnp.promote_types(v.dtype, jnp.float32)
    if initial_state is None:
        B, _, H, V = v.shape
        initial_state = jnp.zeros((B, H, k.shape[-1], V), state_dtype)
    arrays = align(r, w, k, v, u, initial_state.astype(state_dtype))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(*arrays, resets)
