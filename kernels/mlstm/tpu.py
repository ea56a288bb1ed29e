"""mLSTM for TPU: one chunk of time of a few heads at a time, the memory of the heads in VMEM.

The mathematics is that of xla.py. Three kernels. `mlstm_stabiliser` finds m of all tokens. `mlstm_forward` and
`mlstm_backward` (tpu_backward.py) have the grid (batch, blocks of heads, chunks), the chunks one after another, and for
a chunk read one block of what its gates come down to (tpu_chunk.py); nothing of the size [L, L] leaves the chip, or is
there at once: it is made and used in tiles of 128 tokens that wrote and 128 that read.

Heads are beside each other in the lanes, [B, T, H K], as a projection leaves them; what lies otherwise is copied.

Beside inputs, outputs and gradients, a head keeps for the backward pass, a token, (K V itemsize + 4 K) / L bytes (the
memory at the start of every chunk, C in the dtype of the inputs) and 32 bytes of gates; the backward pass itself makes
8 bytes a token and head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import tpu
from phyla.kernels.mlstm import tpu_chunk as chunks
from phyla.kernels.mlstm.reference import empty
from phyla.kernels.mlstm.tpu_backward import run_backward
from phyla.kernels.mlstm.xla import mlstm_xla
from phyla.kernels.partition import per_device

CHUNK = {128: 128, 256: 256}
"""Tokens by the size of heads, on every chip: fewer make the memory move more often, more make more products."""
LEAST_LOG = -110.0
"""Of a decay: exp of it is 0. Sums of 256 such multiples of 1/256 are exact."""
STABILISER_BLOCK = 2048
"""Tokens, of 8 heads."""


def mlstm_tpu(q, k, v, i, f, state, resets, gate, epsilon, *, chunk: int | None = None):
    """Run with float32 state and sums, the products in the dtype of q, k and v. `resets` is bool [B, T] or None.

    One token is decoded by the XLA implementation: reading and writing the memory bounds it, not the products.

    Raises:
        Unfit: the memory of a head is too large for VMEM.
    """
    state = state or empty(q, v, gate)
    if state[0].dtype != jnp.float32:
        raise ValueError("mlstm: 'tpu' computes in float32, but v is float64; cast it or use 'reference'")
    (_, T, _, K), V = q.shape, v.shape[-1]
    if T == 1:
        return mlstm_xla(q, k, v, i, f, state, resets, gate, epsilon)
    dtype = jnp.result_type(q, k, v)
    L = chunk or CHUNK[128 if max(K, V) <= 128 or T <= 128 else 256]
    chunks.check_fits(L, K, V, dtype)
    i, log_f = i.astype(jnp.float32), jax.nn.log_sigmoid(f.astype(jnp.float32))
    if gate == "sigmoid":
        nothing = jnp.zeros_like(state[0][..., 0])
        state, i = (*state, nothing, nothing[..., 0]), jax.nn.log_sigmoid(i)
    i_BxHxT, log_f_BxHxT = _by_head(i, L, -jnp.inf), _by_head(log_f, L, 0.0)
    resets = None if resets is None else jnp.pad(resets, ((0, 0), (0, -T % L)))[:, None]
    options = L, gate == "exponential", epsilon
    q, k, v_ = (x.astype(dtype) for x in (q, k, v))
    h, state = _attend(options, q, k, v_, i_BxHxT, log_f_BxHxT, tuple(state), resets)
    return h.astype(v.dtype), state if gate == "exponential" else state[:1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, i, log_f, state, resets) -> tuple[jax.Array, tuple]:
    """h [B, T, H, V] and the state after the last token; i, log_f [B, H, N L] and resets [B, 1, N L] for N chunks.

    `options` are L, whether there is a normaliser (if not, i is a logarithm <= 0, and n and m remain as they are), and
    epsilon.
    """
    gates, m = _gates(options, q.shape[-1] ** -0.5, i, log_f, state[2], resets)
    h, C, n = _run_forward(options, False, q, k, v, gates, *state[:2])
    return h, (C, n, m)


def _forward(options, q, k, v, i, log_f, state, resets):
    gates, m = _gates(options, q.shape[-1] ** -0.5, i, log_f, state[2], resets)
    h, C, n, *starts = _run_forward(options, True, q, k, v, gates, *state[:2])
    return (h, (C, n, m)), (q, k, v, gates, *starts, C, n)


def _backward(options, saved, cotangents):
    q, k, v, gates, C_starts, n_starts, C, n = saved
    dh, (dC, dn, dm) = cotangents
    dm -= jnp.sum(dC * C, (-1, -2)) + jnp.sum(dn * n, -1)  # exp(-m) is a factor of both
    dq, dk, dv, d_gates, dC, dn = run_backward(options, q, k, v, gates, C_starts, n_starts, dh, dC, dn, dm)
    di, d_log_f = d_gates[:, :, 0], d_gates[:, :, 1]
    return dq, dk, dv, di, d_log_f, (dC, dn, d_log_f[..., 0]), None  # m is added to log f


_attend.defvjp(_forward, _backward)


def _gates(options, scale, i_BxHxT, log_f_BxHxT, m_BxH, resets_Bx1xT):
    """What the gates come down to, chunk by chunk as tpu_chunk.py has it, and m after the last token."""
    L, normalise, _ = options
    resets = jnp.zeros((1, 1, 1), bool) if resets_Bx1xT is None else resets_Bx1xT
    shift = jnp.where(resets, -jnp.inf, log_f_BxHxT)
    log_weight, log_decay, least = i_BxHxT, log_f_BxHxT, jnp.zeros_like(shift)
    kept = wrote = jnp.zeros_like(shift, dtype=bool)
    if normalise:
        least = jnp.maximum(i_BxHxT, 0)
        m_BxHxT = _stabiliser(shift, least, m_BxH)
        before_BxHxT = jnp.concatenate([m_BxH[..., None], m_BxHxT[..., :-1]], -1)
        kept = shift + before_BxHxT >= least
        wrote = ~kept & (i_BxHxT >= 0)
        log_weight = i_BxHxT - m_BxHxT
        log_decay = log_f_BxHxT + (before_BxHxT - m_BxHxT)  # the difference first: it is exact where m hardly moves
        m_BxH, least = m_BxHxT[..., -1], jnp.exp(-m_BxHxT)
    log_decay = jnp.where(resets, LEAST_LOG, jnp.maximum(log_decay, LEAST_LOG))
    coarse = jnp.round(log_decay * 256) / 256
    sums = jnp.stack([coarse, log_decay - coarse, 1.0 - kept], 2)
    sums = jnp.cumsum(sums.reshape(*sums.shape[:3], -1, L), -1)
    coarse, fine, run = sums[:, :, 0], sums[:, :, 1], sums[:, :, 2]  # [B, H, N, L]
    log_weight = log_weight.reshape(coarse.shape)
    to_end = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine + log_weight))
    source = log_weight + (math.log(scale) - fine)
    origin = jnp.where(kept, 1.0, jnp.where(wrote, -1.0, 0.0))
    rows = coarse, fine, source, jnp.exp(coarse + fine), to_end, least, run, origin
    return jnp.stack([row.reshape(coarse.shape) for row in rows], 3), m_BxH


def _stabiliser(shift_BxHxT, least_BxHxT, m_BxH):
    """m_t = max(m_{t-1} + shift_t, least_t) for all t."""

    def local(shift, least, m):
        *outer, T = shift.shape
        block = min(STABILISER_BLOCK, chunks.up(T, tpu.LANES))

        def rows(x, padding):
            return chunks.pad(x.reshape(-1, x.shape[-1]), tpu.SUBLANES, block, value=padding)

        given = rows(shift, 0.0), rows(least, -jnp.inf)
        m = chunks.pad(m.reshape(-1, 1), tpu.SUBLANES, 1)
        spec = pl.BlockSpec((tpu.SUBLANES, block), lambda r, t: (r, t))
        column = pl.BlockSpec((tpu.SUBLANES, 1), lambda r, t: (r, 0))
        m = tpu.pallas_call(
            _stabiliser_kernel,
            jax.ShapeDtypeStruct(given[0].shape, jnp.float32),
            *given,
            m,
            grid=(given[0].shape[0] // tpu.SUBLANES, given[0].shape[1] // block),
            in_specs=(spec, spec, column),
            out_specs=spec,
            scratch_shapes=[pltpu.VMEM((tpu.SUBLANES, 1), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=6 * block.bit_length() * given[0].size, transcendentals=0, bytes_accessed=12 * given[0].size
            ),
            name="mlstm_stabiliser",
        )
        return m[: math.prod(outer), :T].reshape(*outer, T)

    return per_device(local, ["B H T", "B H T", "B H"], ["B H T"])(shift_BxHxT, least_BxHxT, m_BxH)


def _stabiliser_kernel(shift_ref, least_ref, m0_ref, m_ref, last_ref):
    """Maps m -> max(m + shift, least) composed with those 1, 2, 4, ... tokens before."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        last_ref[...] = m0_ref[...]

    shift, least = shift_ref[...], least_ref[...]
    t = jax.lax.broadcasted_iota(jnp.int32, shift.shape, 1)
    distance = 1
    while distance < shift.shape[1]:
        earlier = t >= distance
        least = jnp.maximum(least, jnp.where(earlier, pltpu.roll(least, distance, 1), -jnp.inf) + shift)
        shift += jnp.where(earlier, pltpu.roll(shift, distance, 1), 0)
        distance *= 2
    m = jnp.maximum(last_ref[...] + shift, least)
    m_ref[...] = m
    last_ref[...] = m[:, -1:]


def _run_forward(options, save, q, k, v, gates, C, n):
    """h, C and n; if `save`, the memories at the starts of all chunks too."""
    _, normalise, epsilon = options

    def local(q, k, v, gates, C, n):
        K, V = q.shape[-1], v.shape[-1]
        call = chunks.Call(q, v, gates, reverse=False)
        *_, L, Kp, Vp = call.sizes
        h, C, n, *starts = tpu.pallas_call(
            functools.partial(_kernel, K**-0.5, normalise, epsilon),
            call.shapes("v C n C_start n_start" if save else "v C n"),
            *call.arrays("k k v gates C n", q, k, v, gates, C, n[:, :, None]),
            in_specs=call.specs("k k v gates C n"),
            out_specs=call.specs("v C n C_start n_start" if save else "v C n"),
            cost_estimate=call.cost(L * L * (Kp + Vp) + 2 * L * Kp * Vp, 2 * L * (Kp + Vp) + save * Kp * Vp),
            name="mlstm_forward",
            **call.options,
        )
        return call.tokens(h, V), C[..., :K, :V], n[:, :, 0, :K], *starts

    inputs = ["B T H K", "B T H K", "B T H V", "B H N R L", "B H K V", "B H K"]
    results = ["B T H V", "B H K V", "B H K", *["B H N K V", "B H N 1 K"] * save]
    return per_device(local, inputs, results)(q, k, v, gates, C, n)


def _kernel(scale, normalise, epsilon, q_ref, k_ref, v_ref, gates_ref, C0_ref, n0_ref, h_ref, C_ref, n_ref, *starts):
    """The blocks of C_ref and n_ref are the heads' memory while their chunks go by."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        C_ref[...] = C0_ref[...]
        n_ref[...] = n0_ref[...]

    heads, K, V = C_ref.shape[1:]
    dot = functools.partial(chunks.dot, q_ref.dtype)

    def head(r):
        keys, values = slice(r * K, (r + 1) * K), slice(r * V, (r + 1) * V)
        k, v = k_ref[0, :, keys], v_ref[0, :, values]
        C, n = C_ref[0, r], n_ref[0, r]
        C_ = C.astype(q_ref.dtype)
        for starts_ref, start in zip(starts, (C_, n), strict=False):
            starts_ref[0, r, 0] = start
        chunk = chunks.Chunk(gates_ref[0, r, 0], scale)
        for t in chunk.tiles:
            q, start = q_ref[0, t, keys], chunk.read_start[t]
            earlier = [s for s in chunk.tiles if s.start <= t.start]
            product = [chunks.times(chunk.between(t, s), dot(q, k[s], 1, 1)) for s in earlier]
            yield
            product = jnp.concatenate([p.astype(q.dtype) for p in product], 1)
            read = dot(product, v[: t.stop], 1, 0) + chunks.times(start, dot(q, C_, 1, 0))
            if normalise:
                read_n = chunks.sums(dot, product) + chunks.times(start, chunks.sums(dot, q, n))
                yield
                norm, _ = chunk.norm(t, read_n, epsilon)
                read *= chunks.wide(chunks.inverse(norm, q.dtype), V)
            h_ref[0, t, values] = read.astype(h_ref.dtype)
            yield
        written = chunk.to_end * k.astype(jnp.float32)
        C_ref[0, r] = chunks.times(chunk.whole, C) + dot(written, v, 0, 0)
        n_ref[0, r] = chunks.times(chunk.whole, n) + jnp.sum(written, 0, keepdims=True)
        yield

    chunks.in_turns(head, heads)


def _by_head(gate_BxTxH, L, padding):
    """[B, T, H] to [B, H, T], T grown to a multiple of L."""
    return chunks.pad(jnp.moveaxis(gate_BxTxH, 1, 2), L, value=padding)
