"""Linear attention with decay for Hopper, on which `ssd` and `mlstm` rest: chunks of time in matrix products.

    S_t = exp(log_decay_t) S_{t-1} + weight_t v_t k_t',   o_t = S_t q_t

for every head, S being [V, K]. One thread block runs the time of one head and 64 rows of S, which stay in registers;
a chunk of 64 tokens is attention without softmax, and passes S on. Every product is one of `plgpu.wgmma` from SMEM,
[64, 64 or K] of float32, the one form that the compiler for Hopper and the interpreter both have (neither Ampere's
`mma` nor operands in registers are interpreted). The matrix unit takes bfloat16: a float32 is the sum of three, and a
product of two is six products, as exact as float32; with bfloat16 inputs it is one.

| | forward | backward |
|---|---|---|
| products of [64, 64, K] a chunk | 4 (with [64, 64, 64] at K 64) | 9 and 2 of [64, 64, 64] |
| SMEM at K 128, bfloat16 and float32 | 65 KB, 193 KB | 81 KB, 225 KB |
| kept, beyond arguments | | S before every chunk: K V / 16 bytes a token and head |

The log decay between two tokens is a difference of sums over time in two parts: multiples of 2^-10, which float32 adds
without error, and remainders. A reset is a decay to zero; where it is zero nothing passes, not even an overflow.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels import gpu
from phyla.kernels.dispatch import Unfit
from phyla.kernels.gpu import load, pad, store
from phyla.kernels.partition import per_device

CHUNK = 64
"""Tokens, and rows of S in a thread block: the rows of one product."""
KEYS = 128
"""At most: a float32 [64, 128] is 64 registers a thread, and 48 KB of SMEM as an operand."""
FORGET = -128.0
"""exp of it, or of less, is 0 in float32."""
SQUARE = plgpu.Layout.WGMMA
DOWN, ACROSS = SQUARE.reduce(1), SQUARE.reduce(0)
"""Vectors with one number a row, and one a column."""


def fit(op: str, K: int) -> None:
    """Raise `Unfit` where there is no such kernel."""
    if K > KEYS:
        raise Unfit(f"the keys of {op} have {K} numbers, and the registers hold at most {KEYS}")
    fit_chip(op)


def fit_chip(op: str) -> None:
    """Raise `Unfit` where there is no `wgmma`."""
    if gpu.capability() not in (None, "9.0"):
        raise Unfit(f"{op} multiplies with wgmma, which compute capability 9.0 has and {gpu.capability()} has not")


@jax.custom_vjp
def attend(q, k, v, weight, log_decay, state, resets) -> tuple[jax.Array, jax.Array]:
    """o and the last S, both float32.

    q, k [B, T, G, K], v [B, T, H, V] where G divides H, weight and log_decay (<= 0) float32 [B, T, H], state float32
    [B, H, V, K], resets bool [B, T] or None.
    """
    return forward(q, k, v, weight, log_decay, state, resets, save=False)[:2]


def _forward(q, k, v, weight, log_decay, state, resets):
    o, end, states = forward(q, k, v, weight, log_decay, state, resets, save=True)
    return (o, end), (q, k, v, weight, log_decay, resets, states)


def _backward(saved, cotangents):
    *gradients, d_state = backward(*saved, *cotangents)
    dtypes = (v.dtype for v in saved[:5])
    return *(v.astype(dtype) for v, dtype in zip(gradients, dtypes, strict=True)), d_state, None


attend.defvjp(_forward, _backward)


def forward(q, k, v, weight, log_decay, state, resets, *, save):
    """o [B, T, H, V], the last S, and, if `save`, S before every chunk [B, chunk, H, V, K]: all float32."""
    T, V, K = v.shape[1], v.shape[3], q.shape[3]
    gates = _gates(weight, log_decay, resets)
    q, k, v, state = _pad(q), _pad(k), _pad(v), pad(state, 2, CHUNK, 3, CHUNK)
    dims = _dims(q), _dims(q), "B T H V", "G B H T", "B H V K"
    run = per_device(functools.partial(_run_forward, save=save), dims, ("B T H V", "B H V K", "B N H V K"))
    o, end, states = run(q, k, v, gates, state)
    return o[:, :T, :, :V], end[:, :, :V, :K], states


def backward(q, k, v, weight, log_decay, resets, states, do, d_end):
    """Gradients of q, k, v, weight, log_decay and the state before the first token: all float32."""
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    gates = _gates(weight, log_decay, resets)
    arguments = _pad(q), _pad(k), _pad(v), gates, states, _pad(do), pad(d_end, 2, CHUNK, 3, CHUNK)
    dims = _dims(q), _dims(q), "B T H V", "G B H T", "B N H V K", "B T H V", "B H V K"
    results = "B P T H K", "B P T H K", "B T H V", "B P G H T", "B N H V", "B H V K"
    dq, dk, dv, sums, kept, d_start = per_device(_run_backward, dims, results)(*arguments)
    dq, dk = (d.sum(1)[:, :T, :, :K].reshape(B, T, G, H // G, K).sum(3) for d in (dq, dk))
    # What passes a token from earlier ones (or the chunk's start) to it and later ones (or the chunk's end) is summed:
    # a difference of sums would leave noise where little passes.
    d_weight, within, from_start, to_end = jnp.moveaxis(sums.sum(1), 3, 2).reshape(B, 4, -1, CHUNK, H).swapaxes(0, 1)
    d_log_decay = within + jax.lax.cumsum(from_start, 2, reverse=True) + jnp.cumsum(to_end, 2) - to_end
    d_log_decay += kept.sum(3)[:, :, None]
    d_weight, d_log_decay = (d.reshape(B, -1, H)[:, :T] for d in (d_weight, d_log_decay))
    return dq, dk, dv[:, :T, :, :V], d_weight, d_log_decay, d_start[:, :, :V, :K]


def _run_forward(q, k, v, gates, state, *, save):
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]

    def body(q_ref, k_ref, v_ref, gates_ref, state_ref, o_ref, end_ref, states_ref, q_s, k_s, v_s, w_s, S_s, gates_s):
        b, h, r = (jax.lax.axis_index(name) for name in "bhr")
        block, group = pl.ds(r * CHUNK, CHUNK), h // (H // G)

        def chunk(n, S):
            t = pl.ds(n * CHUNK, CHUNK)
            if save:
                store(states_ref.at[b, n, h, block], S)
            put(q_s, load(q_ref.at[b, t, group], SQUARE))
            put(k_s, load(k_ref.at[b, t, group], SQUARE))
            v = load(v_ref.at[b, t, h, block], SQUARE)
            put(v_s, v)
            put(S_s, S)
            decay = _Decays(gates_ref, gates_s, b, h, n)
            plgpu.commit_smem()
            put(w_s, product(q_s, turn(k_s)) * decay.between * decay.weight_across)
            of_start = fade(product(q_s, turn(S_s)), columns(decay.since_start, CHUNK))
            plgpu.commit_smem()
            store(o_ref.at[b, t, h, block], product(w_s, v_s) + of_start)
            put(v_s, v * columns(decay.to_end * decay.weight, CHUNK))
            plgpu.commit_smem()
            S = fade(S, splat(decay.whole, S.shape)) + product(turn(v_s), k_s)
            plgpu.commit_smem()
            return S

        S = jax.lax.fori_loop(0, T // CHUNK, chunk, load(state_ref.at[b, h, block], SQUARE))
        store(end_ref.at[b, h, block], S)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    scratch = *(operand(CHUNK, n, v.dtype) for n in (K, K, CHUNK, CHUNK, K)), plgpu.SMEM((3, CHUNK), jnp.float32)
    out = shape(v.shape), shape(state.shape), shape((B, T // CHUNK if save else 1, H, V, K))
    flops = 2 * B * H * T * V * (CHUNK + 2 * K) + 2 * B * H * T * CHUNK * K * (V // CHUNK)
    return _call("attention_forward", body, out, (q, k, v, gates, state), scratch, flops)


def _run_backward(q, k, v, gates, states, do, d_end):
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    last = T // CHUNK - 1

    def body(*refs):
        q_ref, k_ref, v_ref, gates_ref, states_ref, do_ref, d_end_ref = refs[:7]
        dq_ref, dk_ref, dv_ref, sums_ref, kept_ref, d_start_ref = refs[7:13]
        q_s, k_s, v_s, do_s, w_s, S_s, earlier_s, gates_s = refs[13:]
        b, h, r = (jax.lax.axis_index(name) for name in "bhr")
        block, group = pl.ds(r * CHUNK, CHUNK), h // (H // G)
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), d, layout=SQUARE) for d in (0, 1))
        put(earlier_s, jnp.where(row < column, 1.0, 0.0))

        def chunk(done, dS):
            n = last - done
            t = pl.ds(n * CHUNK, CHUNK)
            put(q_s, load(q_ref.at[b, t, group], SQUARE))
            put(k_s, load(k_ref.at[b, t, group], SQUARE))
            put(v_s, load(v_ref.at[b, t, h, block], SQUARE))
            do = load(do_ref.at[b, t, h, block], SQUARE)
            put(do_s, do)
            put(S_s, dS)
            decay = _Decays(gates_ref, gates_s, b, h, n)
            plgpu.commit_smem()
            scores = product(q_s, turn(k_s))
            # Where the decay is 0, v may be an overflow in another document.
            d_scores = fade(product(do_s, turn(v_s)), decay.between)

            put(w_s, d_scores)
            plgpu.commit_smem()
            k = load(k_ref.at[b, t, group], SQUARE)
            dk_end = fade(product(v_s, S_s), columns(decay.to_end, K))
            store(sums_ref.at[b, r, 3, h, t], jnp.sum(k * dk_end, 1) * decay.weight)
            dk = product(turn(w_s), q_s) + dk_end
            store(sums_ref.at[b, r, 0, h, t], jnp.sum(k * dk, 1))
            store(dk_ref.at[b, r, t, h], dk * columns(decay.weight, K))
            plgpu.commit_smem()

            put(w_s, scores * decay.between)
            plgpu.commit_smem()
            dv = product(turn(w_s), do_s) + fade(product(k_s, turn(S_s)), columns(decay.to_end, CHUNK))
            store(dv_ref.at[b, t, h, block], dv * columns(decay.weight, CHUNK))
            plgpu.commit_smem()

            S = load(states_ref.at[b, n, h, block], SQUARE)
            whole = splat(decay.whole, S.shape)
            store(kept_ref.at[b, n, h, block], jnp.sum(jnp.where(whole > 0, dS * whole * S, 0.0), 1))
            put(S_s, S)
            d_scores *= decay.weight_across
            put(w_s, d_scores)
            plgpu.commit_smem()
            dq_start = fade(product(do_s, S_s), columns(decay.since_start, K))
            store(sums_ref.at[b, r, 2, h, t], jnp.sum(load(q_ref.at[b, t, group], SQUARE) * dq_start, 1))
            store(dq_ref.at[b, r, t, h], product(w_s, k_s) + dq_start)
            plgpu.commit_smem()

            put(w_s, d_scores * scores)
            put(do_s, do * columns(decay.since_start, CHUNK))
            plgpu.commit_smem()
            to_later = product(w_s, earlier_s)
            store(sums_ref.at[b, r, 1, h, t], jnp.sum(jnp.where(row >= column, to_later, 0.0), 0))
            dS = fade(dS, whole) + product(turn(do_s), q_s)
            plgpu.commit_smem()
            return dS

        dS = jax.lax.fori_loop(0, last + 1, chunk, load(d_end_ref.at[b, h, block], SQUARE))
        store(d_start_ref.at[b, h, block], dS)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    wide = shape((B, V // CHUNK, T, H, K))
    out = wide, wide, shape(v.shape), shape((B, V // CHUNK, 4, H, T)), shape(states.shape[:4]), shape(d_end.shape)
    scratch = tuple(operand(CHUNK, n, v.dtype) for n in (K, K, CHUNK, CHUNK, CHUNK, K))
    scratch += operand(CHUNK, CHUNK, jnp.bfloat16), plgpu.SMEM((3, CHUNK), jnp.float32)
    flops = 2 * B * H * T * V * (3 * CHUNK + 4 * K) + 2 * B * H * T * CHUNK * 3 * K * (V // CHUNK)
    return _call("attention_backward", body, out, (q, k, v, gates, states, do, d_end), scratch, flops)


class _Decays:
    """Of a chunk: its weights, and products of its decays, each at most 1; vectors DOWN but where it says ACROSS."""

    def __init__(self, gates_ref, gates_s, b, h, n):
        t = pl.ds(n * CHUNK, CHUNK)
        down = [load(gates_ref.at[i, b, h, t], DOWN) for i in range(3)]
        for i, v in enumerate(down):
            store(gates_s.at[i], v)
        coarse, fine, self.weight = down
        coarse_across, fine_across, weight_across = (load(gates_s.at[i], ACROSS) for i in range(3))
        end = n * CHUNK + CHUNK - 1
        coarse_end, fine_end = gates_ref[0, b, h, end], gates_ref[1, b, h, end]
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), d, layout=SQUARE) for d in (0, 1))
        between = columns(coarse, CHUNK) - rows(coarse_across, CHUNK)
        between += columns(fine, CHUNK) - rows(fine_across, CHUNK)
        # Row i, column j is the decay from token j to token i.
        self.between = jnp.where(row >= column, jnp.exp(jnp.minimum(between, 0.0)), 0.0)
        self.since_start = jnp.exp(coarse + fine)
        self.to_end = jnp.exp((splat(coarse_end, CHUNK, DOWN) - coarse) + (splat(fine_end, CHUNK, DOWN) - fine))
        self.whole = jnp.exp(coarse_end + fine_end)
        self.weight_across = rows(weight_across, CHUNK)


def _gates(weight, log_decay, resets):
    """Of each chunk, [3, B, H, T]: sums of the log decay since its start, coarse and fine; weights."""
    if resets is not None:
        log_decay = jnp.where(resets[..., None], FORGET, log_decay)
    log_decay = jnp.maximum(log_decay, FORGET)
    coarse = jnp.ceil(log_decay * 2**10) / 2**10
    gates = pad(jnp.stack([coarse, log_decay - coarse, weight]), 2, CHUNK)
    chunks = gates.reshape(*gates.shape[:2], -1, CHUNK, gates.shape[3])
    gates = jnp.concatenate([jnp.cumsum(chunks[:2], 3), chunks[2:]])
    return jnp.moveaxis(gates.reshape(3, gates.shape[1], -1, gates.shape[4]), 3, 2)


def _pad(v):
    """[B, T, H, size] in whole chunks: zeros write nothing and leave S as it is."""
    return pad(v, 1, CHUNK, 3, CHUNK)


def _dims(q):
    """One group is whole on every device; several are divided with their heads, or not at all."""
    return "B T G K" if q.shape[2] == 1 else "B T H K"


def parts(dtype):
    """How many bfloat16 make an operand of products that is exact enough for numbers of this dtype."""
    return 1 if dtype == jnp.bfloat16 else 3


def operand(rows, columns, dtype):
    """SMEM for an operand of products, in parts."""
    return [plgpu.SMEM((rows, columns), jnp.bfloat16)] * parts(dtype)


def _call(name, body, out, arguments, scratch, flops):
    moved = sum(v.size * v.dtype.itemsize for v in (*arguments, *out))
    v = arguments[2]
    return gpu.kernel(
        body,
        out,
        *arguments,
        grid=(v.shape[0], v.shape[2], v.shape[3] // CHUNK),
        grid_names=("b", "h", "r"),
        kernel_name=name,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),  # exp to 2 units in the last place
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=v.size, bytes_accessed=moved),
    )


def put(refs, v):
    """Write float32 registers to SMEM, in as many bfloat16 parts as there are Refs."""
    for ref in refs:
        part = v.astype(jnp.bfloat16)
        plgpu.store(ref, part, optimized=False)
        v = v - part.astype(jnp.float32)


def turn(refs):
    """Transposed, in place."""
    return [ref.T for ref in refs]


def product(a, b):
    """a @ b of operands in SMEM, in parts: what is smaller than the last part's rounding is left out."""

    def run(sum_ref):
        for i, x in enumerate(a):
            for y in b[: len(a) - i]:
                plgpu.wgmma(sum_ref, x, y)
        return sum_ref[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a[0].shape[0], b[0].shape[1]), jnp.float32))


def fade(v, decay):
    """v · decay, and 0 where the decay is, even if v overflowed in another document."""
    return jnp.where(decay > 0, v * decay, 0.0)


def columns(v, width):
    """A vector DOWN as equal columns."""
    return plgpu.layout_cast(gpu.columns(v, width), SQUARE)


def rows(v, height):
    """A vector ACROSS as equal rows."""
    return plgpu.layout_cast(gpu.rows(v, height), SQUARE)


def splat(scalar, shape, layout: Any = SQUARE):
    """A scalar everywhere."""
    return plgpu.layout_cast(jnp.broadcast_to(scalar, shape), layout)
