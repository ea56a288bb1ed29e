"""WKV-7 for GPUs: one thread block runs the time of one head, 64 rows of its state in registers.

A row of S needs nothing of another forwards: the vectors of a token come to SMEM some tokens ahead, and a token is four
multiply-adds of [64, 64], and two sums over keys, of four threads a row. Products of matrices are not to be had without
an inverse (the XLA implementation has it), so that nothing here is of one generation of chips only.

Backward: chunks of 8 tokens in reverse. The states of a chunk are recomputed into SMEM (128 KB) from that before it,
which the forward pass wrote: V K / 2 bytes a token and head, the only temporaries that grow with T V K. Sums over rows
go through SMEM, five a token; over blocks of rows they are XLA's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.gpu import columns, kernel, load, pad, pipeline, reset, rows, store
from phyla.kernels.partition import per_device
from phyla.kernels.wkv7.xla import wkv7_xla

CHUNK = 8
"""Tokens between saved states, and in SMEM at a time, twice."""
SIZE = 64
"""Of a block: rows of S, and keys at most, of which the states of a chunk fill the SMEM of the smallest chip."""
SQUARE = plgpu.Layout.WGMMA
BY_VALUE, BY_KEY = SQUARE.reduce(1), SQUARE.reduce(0)


def wkv7_gpu(r, log_w, k, v, a, b, initial_state, resets):
    """Run in float32. `resets` is bool [B, T] or None. One token is bound by memory, and runs in XLA.

    Raises:
        Unfit: keys of more than 64 numbers.
    """
    if initial_state.dtype != jnp.float32:
        raise ValueError("wkv7: 'gpu' computes in float32, but v is float64; cast it or use 'reference'")
    if r.shape[3] > SIZE:
        raise Unfit(f"the keys of wkv7 have {r.shape[3]} numbers, and shared memory holds states of at most {SIZE}")
    if r.shape[1] == 1:
        return wkv7_xla(r, log_w, k, v, a, b, initial_state, resets)
    return _scan(r, log_w, k, v, a, b, initial_state, resets)


TOKEN = ("B T H K",) * 3 + ("B T H V",) + ("B T H K",) * 2


@jax.custom_vjp
def _scan(r, log_w, k, v, a, b, S, resets) -> tuple[jax.Array, jax.Array]:
    return _forward(r, log_w, k, v, a, b, S, resets, save=False)[0]


def _forward(r, log_w, k, v, a, b, S, resets, *, save):
    run = functools.partial(_run_forward, save=save)
    arguments, results = (*TOKEN, "B H V K", "B T"), ("B T H V", "B H V K", "B N H V K")
    y, end, states = per_device(run, arguments, results)(r, log_w, k, v, a, b, S, resets)
    return (y, end), (r, log_w, k, v, a, b, resets, states)


def _backward(saved, cotangents):
    arguments = (*TOKEN, "B T", "B N H V K", "B T H V", "B H V K")
    results = *("B P T H K",) * 5, "B T H V", "B H V K"
    *by_key, dv, dS = per_device(_run_backward, arguments, results)(*saved, *cotangents)
    dr, d_log_w, dk, da, db = (d.sum(1) for d in by_key)
    gradients = zip((dr, d_log_w, dk, dv, da, db), saved, strict=False)
    return *(d.astype(x.dtype) for d, x in gradients), dS, None


_scan.defvjp(functools.partial(_forward, save=True), _backward)


def _run_forward(r, log_w, k, v, a, b, S, resets, *, save):
    (B, T, H, V), K = v.shape, r.shape[3]
    staged, resets = [_flat(x) for x in (r, log_w, k, v, a, b)], _flat_resets(resets)
    S = pad(S, 2, SIZE, 3, SIZE)
    blocks, chunks = S.shape[2] // SIZE, staged[0].shape[1] // CHUNK

    def body(*refs):
        *staged_refs, S_ref = refs[:7]
        resets_ref = None if resets is None else refs[7]
        y_ref, end_ref, states_ref = refs[-3:]
        at, h, p = (jax.lax.axis_index(name) for name in "bhp")
        block = pl.ds(p * SIZE, SIZE)

        def chunk(n, *blocks_and_S):
            *blocks_s, S = blocks_and_S
            if save:
                store(states_ref.at[at, n, h, block], S)

            def step(i, S):
                r, log_w, k, v, a, b = _token(blocks_s, i)
                S = reset(S, resets_ref, at, n * CHUNK + i)
                S, _ = _advance(S, log_w, k, v, a, b)
                store(y_ref.at[at, n * CHUNK + i, h, block], jnp.sum(S * rows(r, SIZE), 1))
                return S

            return jax.lax.fori_loop(0, CHUNK, step, S)

        specs = _specs(at, h, h * blocks + p, lambda n: n)
        S = pipeline(chunk, specs, load(S_ref.at[at, h, block], SQUARE), chunks)(*staged_refs)
        store(end_ref.at[at, h, block], S)

    shape = jax.ShapeDtypeStruct
    states = shape((B, chunks if save else 1, *S.shape[1:]), S.dtype)
    out = shape((B, chunks * CHUNK, H, blocks * SIZE), v.dtype), shape(S.shape, S.dtype), states
    y, end, states = _call("wkv7_forward", body, out, (*staged, S, resets), blocks, 10)
    return y[:, :T, :, :V], end[:, :, :V, :K], states


def _run_backward(r, log_w, k, v, a, b, resets, states, dy, d_end):
    (B, T, H, V), K = v.shape, r.shape[3]
    staged, resets = [_flat(x) for x in (r, log_w, k, v, a, b, dy)], _flat_resets(resets)
    d_end = pad(d_end, 2, SIZE, 3, SIZE)
    blocks, chunks = d_end.shape[2] // SIZE, staged[0].shape[1] // CHUNK

    def body(*refs):
        *staged_refs, states_ref, d_end_ref = refs[:9]
        resets_ref = None if resets is None else refs[9]
        dr_ref, d_log_w_ref, dk_ref, da_ref, db_ref, dv_ref, d_start_ref, S_s = refs[-8:]
        at, h, p = (jax.lax.axis_index(name) for name in "bhp")
        block = pl.ds(p * SIZE, SIZE)

        def chunk(done, *blocks_and_dS):
            *blocks_s, dy_s, dS = blocks_and_dS
            n = chunks - 1 - done

            def recompute(i, S):
                _, log_w, k, v, a, b = _token(blocks_s, i)
                S = reset(S, resets_ref, at, n * CHUNK + i)
                store(S_s.at[i], S)
                S, _ = _advance(S, log_w, k, v, a, b)
                dr = jnp.sum(S * columns(load(dy_s.at[i], BY_VALUE), SIZE), 0)
                store(dr_ref.at[at, p, n * CHUNK + i, h], dr)
                return S

            jax.lax.fori_loop(0, CHUNK, recompute, load(states_ref.at[at, n, h, block], SQUARE))

            def step(done, dS):
                i = CHUNK - 1 - done
                t = n * CHUNK + i
                r, log_w, k, v, a, b = _token(blocks_s, i)
                S = load(S_s.at[i], SQUARE)  # before this token
                dS += columns(load(dy_s.at[i], BY_VALUE), SIZE) * rows(r, SIZE)
                store(dv_ref.at[at, t, h, block], jnp.sum(dS * rows(k, SIZE), 1))
                store(dk_ref.at[at, p, t, h], jnp.sum(dS * columns(v, SIZE), 0))
                u, du = jnp.sum(S * rows(a, SIZE), 1), jnp.sum(dS * rows(b, SIZE), 1)
                store(db_ref.at[at, p, t, h], jnp.sum(dS * columns(u, SIZE), 0))
                store(da_ref.at[at, p, t, h], jnp.sum(S * columns(du, SIZE), 0))
                dS *= rows(jnp.exp(log_w), SIZE)
                store(d_log_w_ref.at[at, p, t, h], jnp.sum(dS * S, 0))
                return reset(dS + columns(du, SIZE) * rows(a, SIZE), resets_ref, at, t)

            return jax.lax.fori_loop(0, CHUNK, step, dS)

        specs = _specs(at, h, h * blocks + p, lambda done: chunks - 1 - done)
        dS = pipeline(chunk, [*specs, specs[3]], load(d_end_ref.at[at, h, block], SQUARE), chunks)(*staged_refs)
        store(d_start_ref.at[at, h, block], dS)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    by_key, by_value = shape((B, blocks, chunks * CHUNK, H, SIZE)), shape((B, chunks * CHUNK, H, blocks * SIZE))
    scratch = (plgpu.SMEM((CHUNK, SIZE, SIZE), jnp.float32),)
    out = (*(by_key,) * 5, by_value, shape(d_end.shape))
    arguments = (*staged, states, d_end, resets)
    *by_key, dv, dS = _call("wkv7_backward", body, out, arguments, blocks, 36, scratch_types=scratch)
    return *(d[:, :, :T, :, :K] for d in by_key), dv[:, :T, :, :V], dS[:, :, :V, :K]


def _advance(S, log_w, k, v, a, b):
    """The state after a token, and S a."""
    u = jnp.sum(S * rows(a, SIZE), 1)
    S = S * rows(jnp.exp(log_w), SIZE) + columns(u, SIZE) * rows(b, SIZE) + columns(v, SIZE) * rows(k, SIZE)
    return S, u


def _token(blocks_s, i):
    """Of token i of a chunk: r, log_w, k, v, a and b."""
    return [load(ref.at[i], BY_VALUE if at == 3 else BY_KEY) for at, ref in enumerate(blocks_s)]


def _flat(x):
    """[B, T, H, size] as [B, T', H size']: whole chunks and blocks. Zeros write and remove nothing, and decay by 1."""
    x = pad(x, 1, CHUNK, 3, SIZE)
    return x.reshape(*x.shape[:2], -1)


def _flat_resets(resets):
    return None if resets is None else pad(resets.astype(jnp.int32), 1, CHUNK)


def _specs(b, h, values, order):
    """Chunks of r, log_w, k, v, a and b; `values` is this block among all of v."""

    def spec(block):
        return plgpu.BlockSpec((None, CHUNK, SIZE), lambda n: (b, order(n), block))

    return [spec(values if at == 3 else h) for at in range(6)]


def _call(name, body, out, arguments, blocks, operations, **options):
    """One thread block for every row of the batch, head and block of rows of S; `operations` are per token and cell."""
    arguments = [x for x in arguments if x is not None]
    batch, length, width = arguments[0].shape
    moved = sum(x.size * x.dtype.itemsize for x in (*arguments, *out))
    cells = batch * length * width * blocks
    cost = pl.CostEstimate(flops=operations * cells * SIZE, transcendentals=cells, bytes_accessed=moved)
    return kernel(
        body,
        out,
        *arguments,
        grid=(batch, width // SIZE, blocks),
        grid_names=("b", "h", "p"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),  # exp to 2 units in the last place
        cost_estimate=cost,
        **options,
    )
