"""WKV-4, the specification: one token at a time, plain autodiff."""

import jax
import jax.numpy as jnp

EMPTY = -1e38
"""pp where nothing has been seen: below every exponent, and finite."""


def wkv4_reference(k, v, w, u, initial_state, resets):
    """Scan over time in the dtype of the state (float32 or float64). `resets` is bool [B, T] or None."""
    aa_BxD, bb_BxD, pp_BxD = initial_state
    dtype = aa_BxD.dtype
    w_D, u_D = w.astype(dtype), u.astype(dtype)

    def step(state, inputs):
        k_BxD, v_BxD, reset_B = inputs
        if reset_B is not None:
            state = tuple(jnp.where(reset_B[:, None], empty, s) for s, empty in zip(state, (0, 0, EMPTY), strict=True))
        y_BxD, _ = add(state, u_D + k_BxD, v_BxD)
        aa_BxD, bb_BxD, pp_BxD = state
        _, state = add((aa_BxD, bb_BxD, pp_BxD + w_D), k_BxD, v_BxD)
        return state, y_BxD

    by_time = [jnp.moveaxis(x, 1, 0).astype(dtype) for x in (k, v)]
    resets_TxB = None if resets is None else resets.T
    state = aa_BxD, bb_BxD, jnp.where(bb_BxD == 0, EMPTY, pp_BxD)
    final_state, y_TxBxD = jax.lax.scan(step, state, (*by_time, resets_TxB))
    return jnp.moveaxis(y_TxBxD, 0, 1).astype(v.dtype), final_state


def add(state, k, v):
    """The average, and the sums, with one more value of weight exp(k)."""
    aa, bb, pp = state
    largest = jnp.maximum(pp, k)
    past, present = jnp.exp(pp - largest), jnp.exp(k - largest)
    aa, bb = past * aa + present * v, past * bb + present
    return aa / bb, (aa, bb, largest)
