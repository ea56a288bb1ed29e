"""WKV-7, the recurrence of RWKV-7: a matrix state with a generalised delta rule."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.wkv7.gpu import wkv7_gpu
from phyla.kernels.wkv7.reference import wkv7_reference
from phyla.kernels.wkv7.tpu import wkv7_tpu
from phyla.kernels.wkv7.xla import wkv7_xla

IMPLEMENTATIONS = {"reference": wkv7_reference, "xla": wkv7_xla, "tpu": wkv7_tpu, "gpu": wkv7_gpu}


def wkv7(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write values into a matrix state at keys, after it has decayed and forgotten what it held there.

        S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ
        y_t = S_t r_t

    for every head on its own, with S_t a matrix [V, K]. (RWKV-7 calls it with a = -κ, b = κ ⊙ rate, where κ is a unit
    vector: what is stored at κ is removed at that rate.) Inputs are float32 or bfloat16; state and sums are float32.
    Differentiable in every floating argument, through both results. Results are finite for log_w in [-2, 0], which has
    RWKV-7's [-0.607, 0] inside, and other inputs up to 1e3 in size, as long as the state and the gradients are.
    Relative to float64 they err by about 1e-6 in RWKV-7's range; the gradient of log_w by 1e-5 at -2.

    Args:
        r: receptance, what is read, [B, T, H, K] with T >= 1.
        log_w: logarithm of the decay per token, [B, T, H, K], <= 0.
        k: key, where the value is written, [B, T, H, K].
        v: value, [B, T, H, V].
        a: what of the state is removed or copied, [B, T, H, K].
        b: where that is added, [B, T, H, K].
        initial_state: S before the first token, [B, H, V, K]; None is zeros. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is zero at the start of every token whose id differs from that of
            the token before it.
        implementation: "reference", "xla", "tpu", "gpu" or None, the best for the backend.

    Returns:
        y, [B, T, H, V] in the dtype of v, and the state after the last token, float32 [B, H, V, K].
        ("reference" computes in float64 when v is float64; the others refuse it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: Peng et al., RWKV-7 "Goose" (arXiv 2503.14456), equations 16 and 17 (the state evolution and its output).
    """
    check(
        "wkv7",
        r=(r, "B T H K"),
        log_w=(log_w, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        a=(a, "B T H K"),
        b=(b, "B T H K"),
        initial_state=(initial_state, "B H V K"),
        segment_ids=(segment_ids, "B T"),
    )
    run = resolve("wkv7", implementation, IMPLEMENTATIONS)
    B, _, H, K = r.shape
    state_dtype = jnp.promote_types(v.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, v.shape[-1], K), state_dtype)
    arrays = align(r, log_w, k, v, a, b, initial_state.astype(state_dtype))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(*arrays, resets)
