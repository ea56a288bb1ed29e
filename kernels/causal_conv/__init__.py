"""Depthwise causal convolution, the short filter before a recurrence."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.causal_conv.reference import causal_conv_reference
from phyla.kernels.causal_conv.xla import causal_conv_xla
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts

IMPLEMENTATIONS = {"reference": causal_conv_reference, "xla": causal_conv_xla}


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Filter every channel with its own W taps over the current and the W - 1 preceding tokens.

        y_t = bias + sum_k weight[W - 1 - k] x_{t-k},  k = 0 .. W - 1

    Inputs are float32 or bfloat16; sums and the state are float32. No activation is applied. Differentiable in
    every floating argument, through both results.

    Args:
        x: input, [B, T, D] with T >= 1.
        weight: taps, [W, D]; the last one multiplies the current token.
        bias: [D], or None for zero.
        initial_state: the W - 1 inputs before the first token, oldest first, [B, W - 1, D]; None is zeros. They
            belong to the first token's segment.
        segment_ids: integers, [B, T]; inputs before a change of id count as zero after it, in y and in the state.
        implementation: "reference", "xla" or None, the best for the backend.

    Returns:
        y, [B, T, D] in the dtype of x, and the last W - 1 inputs of the last token's segment (zeros before its
        start), float32 [B, W - 1, D]. (Both implementations compute in float64 when x is float64.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: the conv1d of Gu and Dao, Mamba (arXiv 2312.00752), section 3.4 and figure 3.
    """
    check("causal_conv", x=(x, "B T D"), weight=(weight, "W D"), bias=(bias, "D"), segment_ids=(segment_ids, "B T"))
    state_shape = (x.shape[0], weight.shape[0] - 1, x.shape[2])
    check("causal_conv", initial_state=(initial_state, "{} {} {}".format(*state_shape)))
    run = resolve("causal_conv", implementation, IMPLEMENTATIONS)
    state_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, state_dtype)
    if bias is None:
        bias = jnp.zeros(x.shape[2:], state_dtype)
    arrays = align(x, weight, bias, initial_state.astype(state_dtype))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(*arrays, resets)
