"""Selective scan for GPUs: one thread block runs the time of 128 channels of one row, the state in registers.

Forward: a thread owns a channel and its N states, so that a token costs N exp2, 2N multiply-adds and no exchange
between threads; x, dt, B and C of the next 16 tokens come to SMEM meanwhile. With gradients, the states at the start
of every 8 tokens are written too: N / 2 bytes per token and channel, the only temporaries that grow with T N.

Backward: the same blocks, chunks of 8 tokens in reverse. The states of a chunk are recomputed into SMEM (64 KB at N
16). The sums over channels for dB and dC are per block of 128 channels, 8 N bytes per token and block, and XLA
adds the blocks up. A thread has four channels and a quarter of the states, so that sums over either are short.

| chip | exp2 per clock of one SM | bytes of x, dt, y per clock of one SM, float32 |
|---|---|---|
| H100 | 16: one token of one channel at N 16 | 14.4: 1.2 tokens of one channel |
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.gpu import ROWS, THREADS, TILES, columns, kernel, load, pad, pipeline, reset, rows, store
from phyla.kernels.partition import per_device
from phyla.kernels.selective_scan.xla import selective_scan_xla

STAGE = 16
"""Tokens in SMEM at a time, twice, in the forward pass."""
CHUNK = 8
"""Tokens between saved states."""
GROUP = 16
"""States, made whole: cp.async copies at least 128 numbers."""
STATES = 32
"""At most: h, its gradient, A and its gradient are N registers a thread each."""


def selective_scan_gpu(x, dt, A, B, C, D, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None. One token is bound by memory, and runs in XLA.

    Raises:
        Unfit: more than 32 states.
    """
    if initial_state.dtype != jnp.float32:
        raise ValueError("selective_scan: 'gpu' computes in float32, but x is float64; cast it or use 'reference'")
    if A.shape[1] > STATES:
        raise Unfit(f"N is {A.shape[1]}, and the registers hold at most {STATES} states a channel")
    if x.shape[1] == 1:
        return selective_scan_xla(x, dt, A, B, C, D, initial_state, resets)
    return _scan(x, dt, A, B, C, D, initial_state, resets)


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, initial_state, resets) -> tuple[jax.Array, jax.Array]:
    def run(*arrays):
        return _run_forward(*arrays, save=False)[:2]

    return per_device(run, INPUTS, ("B T H", "B H N"))(x, dt, A, B, C, D, initial_state, resets)


def _forward(x, dt, A, B, C, D, initial_state, resets):
    def run(*arrays):
        return _run_forward(*arrays, save=True)

    y, h, saved = per_device(run, INPUTS, ("B T H", "B H N", "B K H N"))(x, dt, A, B, C, D, initial_state, resets)
    return (y, h), (x, dt, A, B, C, D, resets, saved)


def _backward(saved, cotangents):
    x, dt, A, B, C, D, resets, states = saved
    dy, dh = cotangents
    arguments = ("B T H", "B T H", "H N", "B T N", "B T N", "H", "B T", "B K H N", "B T H", "B H N")
    results = ("B T H", "B T H", "B H N", "B H T N", "B H T N", "B H", "B H N")
    run = per_device(_run_backward, arguments, results)
    dx, ddt, dA, dB, dC, dD, dh = run(x, dt, A, B, C, D, resets, states, dy, dh)
    gradients = (dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0))
    dtypes = (v.dtype for v in (x, dt, A, B, C, D))
    return *(v.astype(dtype) for v, dtype in zip(gradients, dtypes, strict=True)), dh, None


_scan.defvjp(_forward, _backward)
INPUTS = ("B T H", "B T H", "H N", "B T N", "B T N", "H", "B H N", "B T")


def _run_forward(x, dt, A, B, C, D, h, resets, save):
    (batch, T, channels), N = x.shape, A.shape[1]
    x, dt, A, B, C, D, h, resets = _padded(x, dt, A, B, C, D, h, resets)
    (_, length, width), states = x.shape, A.shape[1]
    staged = (x, dt, B, C)

    def body(*refs):
        *staged_refs, A_ref, D_ref, h_ref = refs[:7]
        resets_ref = None if resets is None else refs[7]
        y_ref, end_ref, saved_ref = refs[-3:]
        b, d = jax.lax.axis_index("b"), jax.lax.axis_index("d")
        here = pl.ds(d * THREADS, THREADS)
        rate = load(A_ref.at[here], ROWS) * math.log2(math.e)
        D = load(D_ref.at[here], ROWS.reduce(1))

        def stage(k, x_ref, dt_ref, B_ref, C_ref, h):
            def chunk(i, h):
                if save:
                    store(saved_ref.at[b, k * (STAGE // CHUNK) + i, here], h)

                def step(j, h):
                    t = i * CHUNK + j
                    x = load(x_ref.at[t], ROWS.reduce(1))
                    dt = load(dt_ref.at[t], ROWS.reduce(1))
                    h = reset(h, resets_ref, b, k * STAGE + t)
                    h = _advance(h, rate, dt, x, load(B_ref.at[t], ROWS.reduce(0)))
                    y = jnp.sum(h * rows(load(C_ref.at[t], ROWS.reduce(0)), THREADS), 1) + D * x
                    store(y_ref.at[b, k * STAGE + t, here], y)
                    return h

                return jax.lax.fori_loop(0, CHUNK, step, h)

            return jax.lax.fori_loop(0, STAGE // CHUNK, chunk, h)

        specs = _specs(staged, STAGE, b, d, lambda k: k)
        start = load(h_ref.at[b, here], ROWS)
        h = pipeline(stage, specs, start, length // STAGE)(*staged_refs)
        store(end_ref.at[b, here], h)

    shape = jax.ShapeDtypeStruct
    saved = (batch, length // CHUNK if save else 1, width, states)
    out = (shape(x.shape, x.dtype), shape(h.shape, h.dtype), shape(saved, h.dtype))
    y, h, saved = _call("selective_scan_forward", body, out, staged, (A, D, h, resets), 8, 1)
    return y[:, :T, :channels], h[:, :channels, :N], saved[:, :, :channels, :N]


def _run_backward(x, dt, A, B, C, D, resets, states, dy, dh):
    (batch, T, channels), N = x.shape, A.shape[1]
    x, dt, A, B, C, D, dh, resets = _padded(x, dt, A, B, C, D, dh, resets)
    dy = pad(dy, 1, STAGE, 2, THREADS)
    states = pad(states, 2, THREADS, 3, GROUP)
    (_, length, width), N16 = x.shape, A.shape[1]
    staged = (x, dt, B, C, dy)
    chunks = length // CHUNK
    by_channel, by_state = TILES.reduce(1), TILES.reduce(0)

    def body(*refs):
        *staged_refs, A_ref, D_ref, states_ref, dh_ref = refs[:9]
        resets_ref = None if resets is None else refs[9]
        dx_ref, ddt_ref, dA_ref, dB_ref, dC_ref, dD_ref, dh0_ref, h_ref = refs[-8:]
        b, d = jax.lax.axis_index("b"), jax.lax.axis_index("d")
        here = pl.ds(d * THREADS, THREADS)
        A = load(A_ref.at[here], TILES)
        rate = A * math.log2(math.e)
        D = load(D_ref.at[here], by_channel)

        def chunk(done, x_ref, dt_ref, B_ref, C_ref, dy_ref, carry):
            k = chunks - 1 - done

            def token(ref, t):
                return load(ref.at[t], by_channel if ref.shape[1] == THREADS else by_state)

            def recompute(t, h):
                h = reset(h, resets_ref, b, k * CHUNK + t)
                store(h_ref.at[t], h)
                h = _advance(h, rate, token(dt_ref, t), token(x_ref, t), token(B_ref, t))
                dC = jnp.sum(h * columns(token(dy_ref, t), N16), 0)
                store(dC_ref.at[b, d, k * CHUNK + t], dC)
                return h

            jax.lax.fori_loop(0, CHUNK, recompute, load(states_ref.at[b, k, here], TILES))

            def step(i, carry):
                g, dA, dD = carry
                t = CHUNK - 1 - i
                at = k * CHUNK + t
                x, dt, dy = (token(ref, t) for ref in (x_ref, dt_ref, dy_ref))
                g += columns(dy, N16) * rows(token(C_ref, t), THREADS)
                du = jnp.sum(g * rows(token(B_ref, t), THREADS), 1)
                dB = jnp.sum(g * columns(dt * x, N16), 0)
                store(dB_ref.at[b, d, at], dB)
                g = reset(g * jnp.exp2(columns(dt, N16) * rate), resets_ref, b, at)
                d_exponent = g * load(h_ref.at[t], TILES)
                ddt = du * x + jnp.sum(d_exponent * A, 1)
                store(ddt_ref.at[b, at, here], ddt)
                store(dx_ref.at[b, at, here], (du * dt + D * dy))
                return g, dA + d_exponent * columns(dt, N16), dD + dy * x

            return jax.lax.fori_loop(0, CHUNK, step, carry)

        start = (
            load(dh_ref.at[b, here], TILES),
            plgpu.layout_cast(jnp.zeros((THREADS, N16), jnp.float32), TILES),
            plgpu.layout_cast(jnp.zeros((THREADS,), jnp.float32), by_channel),
        )
        specs = _specs(staged, CHUNK, b, d, lambda k: chunks - 1 - k)
        g, dA, dD = pipeline(chunk, specs, start, chunks)(*staged_refs)
        store(dh0_ref.at[b, here], g)
        store(dA_ref.at[b, here], dA)
        store(dD_ref.at[b, here], dD)

    blocks = width // THREADS
    shapes = ((batch, width, N16), *((batch, blocks, length, N16),) * 2, (batch, width), dh.shape)
    sums = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    out = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, dt.dtype), *sums)
    scratch = (plgpu.SMEM((CHUNK, THREADS, N16), jnp.float32),)
    results = _call(
        "selective_scan_backward", body, out, staged, (A, D, states, dh, resets), 24, 2, scratch_types=scratch
    )
    dx, ddt, dA, dB, dC, dD, dh = results
    dx, ddt, dB, dC = dx[:, :T, :channels], ddt[:, :T, :channels], dB[:, :, :T, :N], dC[:, :, :T, :N]
    return dx, ddt, dA[:, :channels, :N], dB, dC, dD[:, :channels], dh[:, :channels, :N]


def _call(name, body, out, staged, whole, operations, exps, **options):
    """One thread block for every row and 128 channels; costs are per token, channel and state."""
    (batch, length, width), N = staged[0].shape, staged[2].shape[2]
    size = batch * length * width * N
    arguments = [v for v in (*staged, *whole) if v is not None]
    moved = sum(v.size * v.dtype.itemsize for v in (*arguments, *out))
    return kernel(
        body,
        out,
        *arguments,
        grid=(batch, width // THREADS),
        grid_names=("b", "d"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),  # exp2 is one instruction, to 2 units in the last place
        cost_estimate=pl.CostEstimate(flops=operations * size, transcendentals=exps * size, bytes_accessed=moved),
        **options,
    )


def _padded(x, dt, A, B, C, D, h, resets):
    """Whole blocks: a token with dt 0, a channel or a state more changes nothing. Resets are integers."""
    x, dt = (pad(v, 1, STAGE, 2, THREADS) for v in (x, dt))
    B, C = (pad(v.astype(jnp.float32), 1, STAGE, 2, GROUP) for v in (B, C))
    A, h = (pad(v.astype(jnp.float32), -2, THREADS, -1, GROUP) for v in (A, h))
    D = pad(D.astype(jnp.float32), 0, THREADS)
    return x, dt, A, B, C, D, h, None if resets is None else pad(resets.astype(jnp.int32), 1, STAGE)


def _specs(staged, length, b, d, order):
    """Chunks of [B, T, D], this block's channels, and of [B, T, N]."""

    def spec(v):
        if v.shape[2] % THREADS:
            return plgpu.BlockSpec((None, length, v.shape[2]), lambda k: (b, order(k), 0))
        return plgpu.BlockSpec((None, length, THREADS), lambda k: (b, order(k), d))

    return [spec(v) for v in staged]


def _advance(h, rate, dt, x, B):
    decay = jnp.exp2(columns(dt, rate.shape[1]) * rate)
    return decay * h + columns(dt * x, rate.shape[1]) * rows(B, THREADS)
