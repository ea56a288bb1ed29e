"""mLSTM for TPU, backwards: the chunks in reverse, the gradient of the memory in VMEM (see tpu.py).

A chunk is recomputed from its inputs and the memory at its start, but for h: the products of the gradients with v and
the memory, formed anyway, give dh · h.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import tpu
from phyla.kernels.mlstm import tpu_chunk as chunks
from phyla.kernels.mlstm.tpu_chunk import KEPT, RUN, WROTE
from phyla.kernels.partition import per_device


def run_backward(options, q, k, v, gates, C_starts, n_starts, dh, dC, dn, dm):
    """Gradients of q, k, v, of i and log f ([B, H, 2, N L]), and of C and n before the first token.

    The inputs are those of tpu.py's kernel, what it saved, and the gradients of its results and of m ([B, H]).
    """
    _, normalise, epsilon = options

    def local(q, k, v, gates, C_starts, n_starts, dh, dC, dn, dm):
        K, V = q.shape[-1], v.shape[-1]
        call = chunks.Call(q, v, gates, reverse=True)
        *_, L, Kp, Vp = call.sizes
        given = q, k, v, gates, C_starts, n_starts, dh, dC, dn[:, :, None], dm[:, :, None, None]
        dq, dk, dv, d_gates, dC, dn = tpu.pallas_call(
            functools.partial(_kernel, K**-0.5, normalise, epsilon),
            call.shapes("k k v d_gates C n"),
            *call.arrays("k k v gates C_start n_start v C n m", *given),
            in_specs=call.specs("k k v gates C_start n_start v C n m"),
            out_specs=call.specs("k k v d_gates C n"),
            scratch_shapes=[pltpu.VMEM((1, 1), jnp.float32)],
            cost_estimate=call.cost(L * L * (L + 3 * Kp + 2 * Vp) + 4 * L * Kp * Vp, L * (4 * Kp + 3 * Vp) + Kp * Vp),
            name="mlstm_backward",
            **call.options,
        )
        dq, dk, dv = call.tokens(dq, K), call.tokens(dk, K), call.tokens(dv, V)
        return dq, dk, dv, d_gates, dC[..., :K, :V], dn[:, :, 0, :K]

    tokens = ["B T H K", "B T H K", "B T H V"]
    saved = ["B H N R L", "B H N K V", "B H N 1 K"]
    state = ["B H K V", "B H K"]
    run = per_device(local, [*tokens, *saved, "B T H V", *state, "B H"], [*tokens, "B H G T", *state])
    return run(q, k, v, gates, C_starts, n_starts, dh, dC, dn, dm)


def _kernel(
    scale,
    normalise,
    epsilon,
    q_ref,
    k_ref,
    v_ref,
    gates_ref,
    C_start_ref,
    n_start_ref,
    dh_ref,
    dC_end_ref,
    dn_end_ref,
    dm_end_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    d_gates_ref,
    dC_ref,
    dn_ref,
    dm_ref,
):
    """The blocks of dC_ref and dn_ref are the memory's gradient while the chunks go by, dm_ref that of m."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        dC_ref[...] = dC_end_ref[...]
        dn_ref[...] = dn_end_ref[...]
        dm_ref[...] = dm_end_ref[0, 0]

    q, k, v, d_read = q_ref[0], k_ref[0], v_ref[0], dh_ref[0]
    C, n = C_start_ref[0, 0, 0], n_start_ref[0, 0, 0]
    dC, dn = dC_ref[0, 0], dn_ref[0, 0]
    gates_RxL = gates_ref[0, 0, 0]
    dot = functools.partial(chunks.dot, q.dtype)
    q_wide, k_wide = q.astype(jnp.float32), k.astype(jnp.float32)
    decay = chunks.decays(gates_RxL, scale)
    passes = decay.between > 0
    norm = slope = along = d_norm = jnp.zeros((len(q), 1))
    product = chunks.times(decay.between, dot(q, k, 1, 1))
    if normalise:
        norm, slope = chunks.norm(q, n, product, decay, epsilon)
        d_read = (d_read.astype(jnp.float32) / norm).astype(q.dtype)
    d_between, dq_start = dot(d_read, v, 1, 1), dot(d_read, C, 1, 1)
    if normalise:  # what is divided by is read like one more column of v, all ones
        along = _sum(jnp.where(passes, product * d_between, 0))
        along = (along + chunks.times(decay.from_start, _sum(q_wide * dq_start))) / norm
        d_norm = -along * slope
        d_between, dq_start = d_between + d_norm, dq_start + d_norm * n
    dq_start = chunks.times(decay.from_start, dq_start)
    dk_end = chunks.times(decay.to_end, dot(v, dC, 1, 1) + dn)
    d_product = chunks.times(decay.between, d_between)
    dq_ref[0] = (dot(d_product, k, 1, 0) + dq_start).astype(dq_ref.dtype)
    dk_ref[0] = (dot(d_product, q, 0, 0) + dk_end).astype(dk_ref.dtype)
    dv_ref[0] = (dot(product, d_read, 0, 0) + chunks.times(decay.to_end, dot(k, dC, 1, 0))).astype(dv_ref.dtype)

    # The decay of token u acts on all that is read at t >= u of what was written at s < u. These are summed, not found
    # as differences of running sums: those leave noise where little is passed on, and between documents.
    causal = chunks.causal(len(q))
    passed = jnp.where(passes, product * d_between, 0)
    kept = _sum(k_wide * dk_end)  # by the memory at the end, of each token
    whole = jnp.sum(chunks.times(decay.whole, dC * C.astype(jnp.float32))) + jnp.sum(chunks.times(decay.whole, dn * n))
    read_later = dot(passed, jnp.where(causal, 0.0, 1.0), 1, 0) + _sum(q_wide * dq_start)
    d_log_f = _sum(jnp.where(causal, read_later, kept), 0) + whole
    di = _sum(passed + jnp.where(_diagonal(len(q)), kept, 0), 0)
    if (
        normalise
    ):  # exp(-m) is a factor of all that is read, and of norm - epsilon; m reaches back as far as it was kept
        run_1xL, run_Lx1 = gates_RxL[RUN : RUN + 1], gates_RxL.T[:, RUN : RUN + 1]
        dm = _sum(jnp.where(causal & (run_Lx1 == run_1xL), -epsilon * along, 0), 0)
        dm += jnp.where(run_1xL == run_1xL[:, -1:], dm_ref[...], 0)
        d_log_f += gates_RxL[KEPT : KEPT + 1] * dm
        di += gates_RxL[WROTE : WROTE + 1] * dm
        dm_ref[...] = (gates_RxL[KEPT : KEPT + 1] * dm)[:, :1]
    d_gates_ref[0, 0, 0:1] = di
    d_gates_ref[0, 0, 1:2] = d_log_f

    read_by = decay.from_start * q_wide
    dC_ref[0, 0] = chunks.times(decay.whole, dC) + dot(read_by, d_read, 0, 0)
    dn_ref[0, 0] = chunks.times(decay.whole, dn)
    if normalise:
        dn_ref[0, 0] += _sum(chunks.times(decay.from_start, q_wide * d_norm), 0)


def _sum(x, axis=1):
    return jnp.sum(x, axis, keepdims=True)


def _diagonal(L):
    return jax.lax.broadcasted_iota(jnp.int32, (L, L), 0) == jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)
