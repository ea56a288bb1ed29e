"""mLSTM, the matrix memory of xLSTM."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from phyla.kernels.arguments import align, check
from phyla.kernels.dispatch import resolve
from phyla.kernels.mlstm.gpu import mlstm_gpu
from phyla.kernels.mlstm.reference import mlstm_reference
from phyla.kernels.mlstm.tpu import mlstm_tpu
from phyla.kernels.mlstm.xla import mlstm_xla
from phyla.kernels.segments import starts

IMPLEMENTATIONS = {"reference": mlstm_reference, "xla": mlstm_xla, "tpu": mlstm_tpu, "gpu": mlstm_gpu}
Gate = Literal["exponential", "sigmoid"]


def mlstm(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    i: jax.Array,
    f: jax.Array,
    *,
    initial_state: tuple[jax.Array, ...] | None = None,
    segment_ids: jax.Array | None = None,
    gate: Gate = "exponential",
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Write v_t under the key k_t into a matrix that forgets, and read it with q_t.

    With the exponential input gate, for every head, a normaliser n and a stabiliser m go with the matrix:

        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t, 0)
        C_t = exp(log sigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T,   n_t likewise with k_t alone
        h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + epsilon),   q_t divided by sqrt(K) beforehand

    and with the sigmoid one, C_t = sigmoid(f_t) C_{t-1} + sigmoid(i_t) k_t v_t^T and h_t = C_t^T q_t alone.

    In exact arithmetic h does not depend on m but for epsilon: exp(m) C is the memory, and the published m is that
    above without the 0, which keeps exp(-m) from overflowing. What it changes is epsilon exp(m) in a sum with a number
    that is at least 1, where the published m < 0: less than epsilon of h. Hence zeros are the empty state, as m = 0
    is in the authors' code.

    Inputs are float32 or bfloat16; state and sums are float32. Differentiable in every floating argument, through all
    results. Results and gradients are finite for any finite i and f, as long as sums of products of q, k and v are.

    Args:
        q: queries, [B, T, H, K] with T >= 1.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        i: input gate before its activation, [B, T, H].
        f: forget gate before its sigmoid, [B, T, H].
        initial_state: (C [B, H, K, V], n [B, H, K], m [B, H]) before the first token, or (C,) with the sigmoid gate;
            None is zeros. It belongs to the first token's segment.
        segment_ids: integers, [B, T]; the state is zero at the start of every token whose id differs from that of
            the token before it.
        gate: the input gate's activation.
        epsilon: added to the normaliser.
        implementation: "reference", "xla", "tpu", "gpu" or None, the best for the backend.

    Returns:
        h, [B, T, H, V] in the dtype of v, and the state after the last token, float32.
        ("reference" computes in float64 when v is float64; the others refuse it.)

    Raises:
        ValueError: a shape or dtype does not fit, or the gate or implementation is unknown.

    Source: Beck et al., xLSTM (arXiv 2405.04517), equations 19-27; the sigmoid gate, without a normaliser, is that of
    Beck et al., Tiled Flash Linear Attention (arXiv 2503.14376).
    """
    if gate not in get_args(Gate):
        raise ValueError(f"mlstm: unknown gate {gate!r}; choices: {', '.join(get_args(Gate))}")
    tokens = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "i": (i, "B T H"), "f": (f, "B T H")}
    names = {"C": "B H K V", "n": "B H K", "m": "B H"} if gate == "exponential" else {"C": "B H K V"}
    parts = (None,) * len(names) if initial_state is None else initial_state
    if len(parts) != len(names):
        raise ValueError(f"mlstm: initial_state has {len(parts)} arrays, expected ({', '.join(names)})")
    state = {f"initial {name}": (array, names[name]) for name, array in zip(names, parts, strict=True)}
    check("mlstm", **tokens, **state, segment_ids=(segment_ids, "B T"))
    run = resolve("mlstm", implementation, IMPLEMENTATIONS)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v, i, f, *parts = align(q, k, v, i, f, *(array.astype(dtype) for array in initial_state or ()))
    resets = None if segment_ids is None else starts(segment_ids)
    return run(q, k, v, i, f, tuple(parts) or None, resets, gate, epsilon)
