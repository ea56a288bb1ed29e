"""WKV-4, the recurrence of RWKV-4: an average of values, weighted by keys that fade."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.wkv4.reference import wkv4_reference
from phyla.kernels.wkv4.xla import wkv4_xla

IMPLEMENTATIONS = {"reference": wkv4_reference, "xla": wkv4_xla}

State = tuple[jax.Array, jax.Array, jax.Array]


def wkv4(
    k: jax.Array,
    v: jax.Array,
    w: jax.Array,
    u: jax.Array,
    *,
    initial_state: State | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """Average the values of the past, each with the weight of its key and its age.

              sum_{s<t} exp((t-1-s) w + k_s) v_s + exp(u + k_t) v_t
        y_t = -----------------------------------------------------
              sum_{s<t} exp((t-1-s) w + k_s)     + exp(u + k_t)

    for every channel of D on its own. The sums are kept as aa exp(pp) and bb exp(pp) with pp the largest exponent
    in them, so that every exp is of a number <= 0: keys of any size are safe. Inputs are float32 or bfloat16; state
    and sums are float32. Differentiable in every floating argument, through both results.

    Args:
        k: keys, [B, T, D] with T >= 1.
        v: values, [B, T, D].
        w: log of the decay a token, [D], <= 0 (the caller has applied -exp).
        u: bonus of the present token, [D].
        initial_state: (aa, bb, pp) before the first token, each [B, D] with bb >= 0; None is zeros. Where bb is zero
            nothing has been seen, and aa and pp do not matter. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is empty at the start of every token whose id differs from that of
            the token before it.
        implementation: "reference", "xla" or None, the best for the backend.

    Returns:
        y, [B, T, D] in the dtype of v, and (aa, bb, pp) after the last token, float32 [B, D] each.
        ("reference" computes in float64 when v is float64; "xla" refuses it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: Peng et al., RWKV (arXiv 2305.13048), stabilised as its appendix describes.
    """
    aa, bb, pp = (None,) * 3 if initial_state is None else initial_state
    check(
        "wkv4",
        k=(k, "B T D"),
        v=(v, "B T D"),
        w=(w, "D"),
        u=(u, "D"),
        aa=(aa, "B D"),
        bb=(bb, "B D"),
        pp=(pp, "B D"),
        segment_ids=(segment_ids, "B T"),
    )
    run = resolve("wkv4", implementation, IMPLEMENTATIONS)
    state_dtype = jnp.promote_types(v.dtype, jnp.float32)
    zeros = jnp.zeros((v.shape[0], v.shape[2]), state_dtype)
    aa, bb, pp = (zeros if s is None else s.astype(state_dtype) for s in (aa, bb, pp))
    k, v, w, u, aa, bb, pp = align(k, v, w, u, aa, bb, pp)
    resets = None if segment_ids is None else starts(segment_ids)
    return run(k, v, w, u, (aa, bb, pp), resets)
