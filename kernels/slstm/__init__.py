"""sLSTM: the LSTM with exponential gates, a normaliser and recurrent connections within each head."""

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.slstm.gpu import slstm_gpu
from phyla.kernels.slstm.reference import slstm_reference
from phyla.kernels.slstm.tpu import slstm_tpu
from phyla.kernels.slstm.xla import slstm_xla

IMPLEMENTATIONS = {"reference": slstm_reference, "xla": slstm_xla, "tpu": slstm_tpu, "gpu": slstm_gpu}

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def slstm(
    i: jax.Array,
    f: jax.Array,
    z: jax.Array,
    o: jax.Array,
    R: jax.Array,
    bias: jax.Array,
    *,
    initial_state: State | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """Run H recurrent networks of P cells each, whose gates see the head's own output before.

        (i, f, z, o)_t <- (i, f, z, o)_t + R h_{t-1} + bias
        c_t = σ(f_t) c_{t-1} + exp(i_t) tanh(z_t)
        n_t = σ(f_t) n_{t-1} + exp(i_t)
        h_t = σ(o_t) c_t / n_t

    computed with c and n divided by exp(m), where m_t = max(i_t, log σ(f_t) + m_{t-1}), so that every exp is of
    something ≤ 0, n ≥ 1 and |h| ≤ 1. Inputs are float32 or bfloat16; state and sums are float32. Differentiable in
    every floating argument, through both results. Results are finite for gates within ±3e38, as long as
    R h + bias is finite and does not take them beyond float32's range.

    Args:
        i: input gate before its exponential, what comes from the tokens, [B, T, H, P] with T >= 1.
        f: forget gate before its sigmoid, likewise.
        z: cell input before its tanh, likewise.
        o: output gate before its sigmoid, likewise.
        R: recurrent connections in the order i, f, z, o, from the third axis (h_{t-1}) to the fourth, [4, H, P, P].
        bias: in the same order, [4, H, P].
        initial_state: (c, n, h, m) before the first token, each [B, H, P], c and n divided by exp(m); None is zeros.
            Where n is 0 nothing has been seen, and m counts as -inf. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is zero at the start of every token whose id differs from that of
            the token before it.
        implementation: "reference", "xla", "tpu", "gpu" or None, the best for the backend.

    Returns:
        h, [B, T, H, P] in the dtype of i, and the state after the last token, float32 as `initial_state`.
        ("reference" computes in float64 when i is float64; the others refuse it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the implementation is unknown.

    Source: Beck et al., xLSTM (arXiv 2405.04517), equations 8 to 17, with the forget gate as a sigmoid.
    """
    gates = {name: (gate, "B T H P") for name, gate in (("i", i), ("f", f), ("z", z), ("o", o))}
    check("slstm", **gates, R=(R, "4 H P P"), bias=(bias, "4 H P"), segment_ids=(segment_ids, "B T"))
    B, _, H, P = i.shape
    state_dtype = jnp.promote_types(i.dtype, jnp.float32)
    state = (jnp.zeros((B, H, P), state_dtype),) * 4 if initial_state is None else initial_state
    check("slstm", **{f"initial_state[{k}]": (part, f"{B} {H} {P}") for k, part in enumerate(state)})
    run = resolve("slstm", implementation, IMPLEMENTATIONS)
    i, f, z, o, R, bias, *state = align(i, f, z, o, R, bias, *(part.astype(state_dtype) for part in state))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(i, f, z, o, R, bias, tuple(state), resets)
