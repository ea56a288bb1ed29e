"""State-space duality for GPUs: linear attention with decay, in which C asks, B is the key and dt the weight of x."""

import jax.numpy as jnp

from phyla.kernels.gpu_attention import attend, fit
from phyla.kernels.ssd.xla import ssd_xla


def ssd_gpu(x, dt, log_decay, B, C, D, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None. One token is bound by memory, and runs in XLA.

    Raises:
        Unfit: more than 128 states, or a chip other than Hopper.
    """
    if initial_state.dtype != jnp.float32:
        raise ValueError("ssd: 'gpu' computes in float32, but x is float64; cast it or use 'reference'")
    fit("ssd", B.shape[3])
    if x.shape[1] == 1:
        return ssd_xla(x, dt, log_decay, B, C, D, initial_state, resets)
    y, state = attend(C, B, x, dt.astype(jnp.float32), log_decay, initial_state, resets)
    return (y + D.astype(jnp.float32)[:, None] * x).astype(x.dtype), state
