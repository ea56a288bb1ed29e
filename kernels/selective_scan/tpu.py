"""Selective scan for TPUs: 1,024 channels at a time as one register of [8, 128], each of the N states on its own.

The grid is (batch, chunks of time, blocks of channels). A block's states stay in VMEM from chunk to chunk. B and C of
a token are the same for all channels: once a chunk, every number of them is spread over a row of 128 lanes, which a
load repeats eight times down a register at no cost. x and dt come as tiles of [time, 128 channels]; stores with
a stride turn them into one register a token. Where a document begins, the kernels have a dt after which no decay is
left, and for that dt x, B, C and dy count as at most 1e15 (`tpu_layout.MOST`).

Beside inputs, results and gradients, the backward pass keeps the state before every chunk, 4 N D / CHUNK bytes
a token (1,280 for D 5120, N 16, CHUNK 256), and B, C and their gradients with lanes to spare, some 2 KB a token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.arguments import align
from phyla.kernels.partition import per_device
from phyla.kernels.selective_scan.tpu_backward import backward
from phyla.kernels.selective_scan.tpu_layout import ROWS, Sizes, blocks, bounded, channels, weights
from phyla.kernels.selective_scan.xla import selective_scan_xla
from phyla.kernels.tpu import LANES, SUBLANES, pallas_call


def selective_scan_tpu(x, dt, A, B, C, D, initial_state, resets, *, chunk: int | None = None):
    """Scan in float32. `resets` is bool [B, T] or None; `chunk` is in tokens.

    One token is decoded by the XLA implementation: reading and writing the state bounds it.

    Raises:
        Unfit: the states of a chunk of 1,024 channels are too large for VMEM.
    """
    if initial_state.dtype != jnp.float32:
        raise ValueError("selective_scan: 'tpu' computes in float32, but x is float64; cast it or use 'reference'")
    if x.shape[1] == 1:
        return selective_scan_xla(x, dt, A, B, C, D, initial_state, resets)
    Sizes.of(x, B, C, chunk)
    return _scan(chunk, x, dt, A, B, C, D, initial_state, resets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, *arguments) -> tuple[jax.Array, jax.Array]:
    return _run_forward(chunk, False, *arguments)


def _forward(chunk, x, dt, A, B, C, D, initial_state, resets):
    y, state, starts = _run_forward(chunk, True, x, dt, A, B, C, D, initial_state, resets)
    return (y, state), (x, dt, A, B, C, D, resets, starts)


def _backward(chunk, saved, cotangents):
    arrays = ("B T H", "B T H", "H N", "B T N", "B T N", "H", "B T", "B chunks H N 8 128", "B T H", "B H N")
    results = ("B T H", "B T H", "B H N", "B T N H", "B T N H", "B H", "B H N")
    dx, ddt, dA, dB, dC, dD, dh = per_device(functools.partial(backward, chunk), arrays, results)(*saved, *cotangents)
    gradients = dx, ddt, dA.sum(0), dB.sum(-1), dC.sum(-1), dD.sum(0)
    return *(v.astype(of.dtype) for v, of in zip(gradients, saved, strict=False)), dh, None


_scan.defvjp(_forward, _backward)


def _run_forward(chunk, keep, *arguments):
    """y, the final state and, to `keep`, the state before every chunk, [B, chunks, K, N, 8, 128]."""

    def run(x, dt, A, B, C, D, initial_state, resets):
        sizes = Sizes.of(x, B, C, chunk)
        inputs = align(x, dt, *weights(sizes, A, B, C, D, resets), blocks(initial_state))
        results = {"inputs": x.dtype, "state": jnp.float32} | ({"starts": jnp.float32} if keep else {})
        registers = functools.partial(pltpu.VMEM, dtype=jnp.float32)
        y, state, *starts = pallas_call(
            functools.partial(_forward_kernel, sizes),
            tuple(sizes.shape(name, len(x), dtype) for name, dtype in results.items()),
            *inputs,
            in_specs=[sizes.spec(name) for name in ("inputs", "inputs", "tokens", "A", "D", "state")],
            out_specs=tuple(sizes.spec(name) for name in results),
            scratch_shapes=[
                *[registers((sizes.body * SUBLANES, LANES))] * 3,
                registers((sizes.chunk // SUBLANES, sizes.columns, SUBLANES, LANES)),
            ],
            **sizes.options(len(x), "selective_scan_forward", 7),
        )
        return y, channels(state, x.shape[2]), *starts

    arrays = ("B T H", "B T H", "H N", "B T N", "B T N", "H", "B H N", "B T")
    return per_device(run, arrays, ("B T H", "B H N", "B chunks H N 8 128")[: 2 + keep])(*arguments)


def _forward_kernel(sizes, x_ref, dt_ref, tokens_ref, A_ref, D_ref, initial_ref, y_ref, state_ref, *rest):
    """One chunk of one block of channels; state_ref is the state from chunk to chunk."""
    *starts, dt_s, u_s, y_s, spread_s = rest
    c, k = pl.program_id(1), pl.program_id(2)

    @pl.when(c == 0)
    def _():
        state_ref[0, k] = initial_ref[0, k]

    for ref in starts:
        ref[0, 0, 0] = state_ref[0, k]

    @pl.when(k == 0)
    def _():
        sizes.spread(tokens_ref, spread_s)

    def body(i, _):
        first = pl.multiple_of(i * sizes.body, sizes.body)

        def turn(r):
            """Tokens r to r + ROWS, from tiles of [tokens, 128 channels] to registers of 1,024 channels a token."""
            dt, x = sizes.load(dt_ref, first + r, c), sizes.load(x_ref, first + r, c)
            sizes.turn(sizes.decaying(dt, spread_s, first + r), dt_s, r)
            sizes.turn(bounded(dt * x), u_s, r)

        def eight(t):
            """Tokens t to t + SUBLANES."""
            tokens = pl.ds(t * SUBLANES, SUBLANES * SUBLANES)
            dt, u = (ref[tokens, :].reshape(SUBLANES, SUBLANES, LANES) for ref in (dt_s, u_s))
            y = [None] * SUBLANES
            for states in sizes.groups:
                A, h = A_ref[k, states], list(state_ref[0, k, states])
                for s in range(SUBLANES):
                    B, C = sizes.row(spread_s, (first + t) // SUBLANES, s, states)
                    for n in range(len(h)):
                        h[n] = jnp.exp2(dt[s] * A[n]) * h[n] + u[s] * B[n]
                        term = h[n] * C[n]
                        y[s] = term if y[s] is None else y[s] + term
                state_ref[0, k, states] = jnp.stack(h)
            for s in range(SUBLANES):
                sizes.store(y[s], y_s, t + s)

        turn(0)
        for r in range(0, sizes.body, ROWS):
            if r + ROWS < sizes.body:
                turn(r + ROWS)
            for t in range(r, r + ROWS, SUBLANES):
                eight(t)
            y = sizes.turned(y_s, r) + D_ref[...] * sizes.load(x_ref, first + r, c)
            y_ref[0, pl.ds(first + r, ROWS), :] = y.astype(y_ref.dtype)

    jax.lax.fori_loop(0, sizes.chunk // sizes.body, body, None)
