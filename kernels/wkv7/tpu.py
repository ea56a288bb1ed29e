"""WKV-7 for TPU: a Pallas (Mosaic) kernel with the state in VMEM. `tpu_chunk` has the mathematics.

The grid is (batch, heads, time); time goes in order. A step reads a block of some chunks of some groups of heads as
[time, (heads, channels)], the layout of the layers, and writes the output. If a gradient is wanted, it also writes the
state at the start of every chunk, which with the inputs is all that the backward kernel reads: float32, 4 H N² / L
bytes a token for chunks of L and heads padded to N channels.

Documents: a chunk is done once for each document that it has, on inputs that are zero elsewhere. Most have one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from phyla.kernels.dispatch import Unfit
from phyla.kernels.partition import per_device
from phyla.kernels.tpu import LANES, pallas_call
from phyla.kernels.wkv7.tpu_backward import backward
from phyla.kernels.wkv7.tpu_chunk import (
    Blocks,
    Layout,
    apart,
    chunk,
    each_document,
    finish,
    matmul,
    own,
    t_matmul,
    together,
)
from phyla.kernels.wkv7.xla import wkv7_xla

BLOCKS = {2: Blocks(64, 4, 8), 4: Blocks(32, 4, 4)}
"""By the bytes of a number in the products. The same for every chip."""


def wkv7_tpu(r, log_w, k, v, a, b, initial_state, resets, blocks: Blocks | None = None):
    """Run with products in the dtype of v, sums and states in float32. `resets` is bool [B, T] or None.

    Decoding (T = 1) is bound by memory: XLA does it. Exponents are at most chunk max |log_w| / 2.
    """
    if initial_state.dtype != jnp.float32:
        raise ValueError("wkv7: 'tpu' computes in float32, but v is float64; cast it or use 'reference'")
    B, T, H, V = v.shape
    if T == 1:
        return wkv7_xla(r, log_w, k, v, a, b, initial_state, resets)
    K = k.shape[-1]
    if max(K, V) > LANES:
        raise Unfit(f"heads of {K} keys and {V} values, of at most {LANES}")
    N = LANES // 2 if max(K, V) <= LANES // 2 else LANES
    blocks = blocks or BLOCKS[_products(v).itemsize]

    def merge(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, N - x.shape[-1]))).reshape(B, T, H * N)

    S = jnp.pad(initial_state, ((0, 0), (0, 0), (0, N - V), (0, N - K)))
    y, final_state = _scan(blocks, N, *map(merge, (r, log_w, k, v, a, b)), S, resets)
    return y.reshape(B, T, H, N)[..., :V], final_state[:, :, :V, :K]


def _products(v):
    """The dtype of the products."""
    return jnp.dtype(jnp.bfloat16 if v.dtype == jnp.bfloat16 else jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(blocks, N, r, log_w, k, v, a, b, initial_state, resets) -> tuple[jax.Array, jax.Array]:
    """Arrays [B, T, (H, N)], states [B, H, N, N]."""
    return _run(blocks, N, False, r, log_w, k, v, a, b, initial_state, resets)


def _forward(blocks, N, *arguments):
    y, final_state, states = _run(blocks, N, True, *arguments)
    return (y, final_state), (*arguments[:6], arguments[7], states)


def _backward(blocks, N, saved, cotangents):
    call = functools.partial(backward, blocks, N, _products(cotangents[0]))
    arguments = [*6 * ["B T H"], "B T", "B C V H", "B T H", "B H V K"]
    *gradients, d_initial = per_device(call, arguments, [*6 * ["B T H"], "B H V K"])(*saved, *cotangents)
    return *gradients, d_initial, None


_scan.defvjp(_forward, _backward)


def _run(blocks, N, save, *arguments):
    call = functools.partial(_call, blocks, N, save)
    results = ["B T H", "B H V K", *(["B C V H"] if save else [])]
    return per_device(call, [*6 * ["B T H"], "B H V K", "B T"], results)(*arguments)


def _call(blocks, N, save, r, log_w, k, v, a, b, initial_state, resets):
    layout = Layout(blocks, N, v.shape, _products(v))
    arguments = [*map(layout.pad, (r, log_w, k, v, a, b)), layout.merge(initial_state)]
    results = [
        jax.ShapeDtypeStruct(layout.padded, v.dtype),
        jax.ShapeDtypeStruct(arguments[-1].shape, jnp.float32),
        *([jax.ShapeDtypeStruct(layout.states, jnp.float32)] if save else []),
    ]
    in_specs = [*6 * [layout.by_time], layout.whole]
    documents = resets is not None
    y, final_state, *states = pallas_call(
        functools.partial(_kernel, layout, save, documents),
        tuple(results),
        *arguments,
        *([layout.documents(resets)] if documents else []),
        in_specs=[*in_specs, layout.by_document] if documents else in_specs,
        out_specs=(layout.by_time, layout.whole, *([layout.by_chunk] if save else [])),
        scratch_shapes=[layout.scratch],
        cost_estimate=layout.cost(8, 4, [*arguments, *results]),
        name="wkv7_forward",
        **layout.options,
    )
    return layout.cut(y), layout.split(final_state), *states


def _kernel(layout, save, documents, *refs):
    *inputs, initial_state_ref = refs[:7]
    documents_ref = refs[7] if documents else None
    y_ref, final_state_ref, *states_ref, S_ref = refs[8 if documents else 7 :]
    N, L, dtype = layout.N, layout.L, layout.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        S_ref[...] = initial_state_ref[...]

    def step(i, _):
        rows = pl.ds(pl.multiple_of(i * L, L), L)
        if save:
            states_ref[0][i] = S_ref[...]
        if documents:
            y_ref[rows] = jnp.zeros((L, y_ref.shape[1]), y_ref.dtype)

        def run(inside, first):

            def one(lanes):
                S = S_ref[:, lanes] if first is True else jnp.where(first, S_ref[:, lanes], 0)
                r, log_w, k, v, a, b = (inside(ref[rows, lanes]) for ref in inputs)
                parts = yield from chunk(r, log_w, k, v, a, b, S, N, dtype, output=True)
                y, S_ref[:, lanes] = yield from _outputs(parts, N, dtype)
                y = y.astype(y_ref.dtype)
                y_ref[rows, lanes] = y_ref[rows, lanes] + inside(y) if documents else y

            finish(together([one(lanes) for lanes in layout.by_group]))

        each_document(documents_ref, i, L, run)
        return 0

    jax.lax.fori_loop(0, layout.chunks, step, 0)

    @pl.when(pl.program_id(2) == layout.steps - 1)
    def _():
        final_state_ref[...] = S_ref[...]


def _outputs(chunk, N, dtype):
    """y [L, (G, V)], and the state after the chunk."""
    y = chunk.read + matmul(chunk.by_b[chunk.v.shape[0] :], apart(chunk.U, N), dtype)
    yield
    added = t_matmul(jnp.concatenate([chunk.U, chunk.v]), chunk.writes, dtype)
    yield
    return y, (chunk.S + own(added, N)) * chunk.root
