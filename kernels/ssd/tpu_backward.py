"""The backward pass of `ssd.tpu`: chunks in reverse, the gradient of the state on the chip.

Everything of a chunk is computed again from its inputs and the state before it. In memory, beside inputs and
gradients: those of B and C once for each block of heads, 8 J N bytes a token in float32 for J blocks, and of dt and
the log decay with time as the last dimension, 8 H bytes a token.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import tpu
from phyla.kernels.arguments import align
from phyla.kernels.partition import per_device
from phyla.kernels.ssd.tpu_chunk import (
    BLOCK,
    VMEM,
    Decays,
    Sizes,
    Spread,
    arguments,
    between,
    dot,
    inward,
    side_by_side,
    triangle,
)

UNROLL = 8
"""Heads of a block whose gradients are made at once."""


def backward(chunk, heads, saved, cotangents):
    """The gradients of the arguments of `ssd.tpu._scan`."""
    *arrays, states = saved
    B, C = arrays[3:5]
    run = per_device(
        functools.partial(_backward, chunk, heads),
        (*arguments(B.shape[2]), "B K N H", "B T H", "B H P N"),
        ("B T H", "B T H", "B T H", "B H T N", "B H T N", "B H", "B H P N"),
    )
    dx, ddt, d_log_decay, dB, dC, dD, dh = run(*arrays, states, *cotangents)
    # Of each block of heads, to those of its group.
    dB, dC = (v.reshape(v.shape[0], B.shape[2], -1, *v.shape[2:]).sum(2).swapaxes(1, 2) for v in (dB, dC))
    return dx, ddt, d_log_decay.astype(arrays[2].dtype), dB.astype(B.dtype), dC.astype(C.dtype), dD.sum(0), dh, None


def _backward(chunk, heads, x, dt, log_decay, B, C, D, h, resets, states, dy, dh):
    del h
    batch, T, H = dt.shape
    s = Sizes.of(H, x.shape[2] // H, B.shape[2], B.shape[3], chunk, heads)
    documents = s.pad_time(jnp.cumsum(resets, axis=1).astype(jnp.float32))[:, None]
    dy = s.pad_heads(s.pad_time(dy.astype(x.dtype)), channels=True)
    inputs = inward(s, x, dt, log_decay, B, C, D)
    arrays = align(*inputs, documents, states, dy, s.state_in(dh))
    chunks = dy.shape[1] // s.Q
    spec = s.specs(chunks, reverse=True)
    shape = jax.ShapeDtypeStruct
    rows = shape((batch, s.J, s.R, chunks * s.Q), jnp.float32)
    of_block = shape((batch, s.J, chunks * s.Q, s.N), jnp.float32)
    results = {
        "channels": [shape(dy.shape, x.dtype)],
        "rows": [rows, rows],
        "block": [of_block, of_block],
        "sum": [shape((batch, s.J, 1, s.lanes), jnp.float32)],
        "state": [shape(arrays[-1].shape, jnp.float32)],
    }
    names = "channels", "rows", "rows", "group", "group", "D", "time", "states", "channels", "state"
    out = [v for kind in results.values() for v in kind]
    dx, ddt, d_log_decay, dB, dC, dD, dh = tpu.pallas_call(
        functools.partial(_backward_kernel, s),
        tuple(out),
        *arrays,
        grid=(batch, s.J, chunks),
        in_specs=[spec[name] for name in names],
        out_specs=tuple(spec[name] for name, kind in results.items() for _ in kind),
        scratch_shapes=[
            *s.scratch(),
            *(pltpu.VMEM((s.R, s.Q), jnp.float32) for _ in range(2)),
            pltpu.VMEM((s.R // min(s.R, UNROLL), s.Q, 3 * min(s.R, UNROLL)), jnp.float32),
            pltpu.VMEM((s.Q // BLOCK, s.lanes), jnp.float32),
            pltpu.VMEM((s.Q, s.Q), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * s.J * chunks * s.Q * (s.lanes * (2 * s.Q + 5 * s.N) + s.R * s.Q**2 + 3 * s.Q * s.N),
            transcendentals=batch * s.J * chunks * s.R * s.Q**2,
            bytes_accessed=sum(math.prod(v.shape) * v.dtype.itemsize for v in (*arrays, *out)),
        ),
        name="ssd_backward",
    )
    ddt, d_log_decay = (
        s.cut_heads(v.reshape(batch, -1, v.shape[-1]).swapaxes(1, 2)[:, :T]) for v in (ddt, d_log_decay)
    )
    dD = s.cut_heads(dD.reshape(batch, -1), channels=True).reshape(batch, H, -1).sum(-1)
    return s.cut_heads(dx[:, :T], channels=True), ddt, d_log_decay, dB[:, :, :T], dC[:, :, :T], dD, s.state_out(dh)


def _backward_kernel(
    s, x_ref, dt_ref, decay_ref, B_ref, C_ref, D_ref, documents_ref, h_ref, dy_ref, end_ref,
    dx_ref, ddt_ref, d_decay_ref, dB_ref, dC_ref, dD_ref, start_ref,
    g_ref, far_ref, near_ref, from_start_ref, to_end_ref, columns_ref, blocks_ref, d_scores_ref,
):  # fmt: skip
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        g_ref[...] = end_ref[0, 0]
        dD_ref[...] = jnp.zeros_like(dD_ref)

    dtype = x_ref.dtype
    Q, dt, B, C = s.Q, dt_ref[0, 0], B_ref[0, 0], C_ref[0, 0]
    U = min(UNROLL, s.R)
    # Rows are the earlier tokens j, lanes the later tokens i.
    decays = Decays.of(decay_ref[0, 0], far_ref, near_ref, earlier_rows=True)
    for g in range(s.R // U):
        rows = slice(g * U, (g + 1) * U)
        columns_ref[g] = jnp.concatenate([decays.suffix[rows], decays.since_start[rows], dt[rows]]).T
    blocks_ref[...] = Spread(s, decays.blocks).all()
    later = triangle(Q)  # [i, t]: t passes nothing later than i
    documents = jnp.broadcast_to(documents_ref[0], (Q, Q))
    # Where the decay is 0, x may be an overflow in another document, whose product must not be seen.
    visible = later.T & (documents == documents.T)
    passed = visible & ~later
    scores = jnp.where(later.T, dot(B, C, "ij,kj"), 0)
    later = later.astype(dtype)
    d_scores_ref[...] = jnp.zeros_like(d_scores_ref)
    dB_ref[...] = jnp.zeros_like(dB_ref)
    dC_ref[...] = jnp.zeros_like(dC_ref)
    per_tile = s.tile // s.padded_P

    def body(g, _):
        lanes = pl.ds(pl.multiple_of(g * U * s.padded_P, U * s.padded_P), U * s.padded_P)
        heads = pl.ds(pl.multiple_of(g * U, U), U)
        x_, dy_, dx_ = x_ref.at[0, :, lanes], dy_ref.at[0, :, lanes], dx_ref.at[0, :, lanes]
        h_, g_, D_, dD_ = h_ref.at[0, 0, :, lanes], g_ref.at[:, lanes], D_ref.at[:, lanes], dD_ref.at[0, 0, :, lanes]
        ddt_, d_decay_ = ddt_ref.at[0, 0, heads], d_decay_ref.at[0, 0, heads]
        from_start_, to_end_, blocks_ = from_start_ref.at[heads], to_end_ref.at[heads], blocks_ref.at[:, lanes]
        far_, near_ = far_ref.at[:, heads], near_ref.at[:, heads]
        columns = columns_ref[g]
        suffix, since_start, steps = columns[:, :U], columns[:, U : 2 * U], columns[:, 2 * U :]
        d_scores = d_scores_ref[...]
        dB, dC = dB_ref[0, 0], dC_ref[0, 0]
        for tile in range(U * s.padded_P // s.tile):
            at = slice(tile * s.tile, (tile + 1) * s.tile)
            rows = slice(tile * per_tile, (tile + 1) * per_tile)
            x, dy, g = x_[:, at], dy_[:, at], g_[:, at]
            # What overflowed in one document would be 0 · inf in another.
            h = h_[:, at]
            h = jnp.where(jnp.abs(h.astype(jnp.float32)) < jnp.inf, h, 0).astype(dtype)
            narrow_g = g.astype(dtype)
            wide_x, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)
            step, since = side_by_side(s, steps, tile), side_by_side(s, since_start, tile)
            to_end = side_by_side(s, suffix, tile).reshape(-1, BLOCK, s.tile) * blocks_[:, at][:, None]
            to_end = to_end.reshape(Q, s.tile)
            wide_u = wide_x * step
            u, u_at_end = wide_u.astype(dtype), (wide_u * to_end).astype(dtype)
            dy_at_start = (wide_dy * since).astype(dtype)
            dB += dot(u_at_end, narrow_g, "ij,kj")
            dC += dot(dy_at_start, h, "ij,kj")
            g_at_start = g * since[-1:]
            g_[:, at] = g_at_start + dot(C, dy_at_start, "ji,jk")
            passing = (h.astype(jnp.float32) * g_at_start).sum(0, keepdims=True)
            dD_[:, at] += (wide_dy * wide_x).sum(0, keepdims=True)
            du_at_end = dot(B, narrow_g) * to_end
            y_of_start = dot(C, h) * since
            du = None
            for i in range(per_tile):
                r = tile * per_tile + i
                mine = s.lane(x.shape) // s.padded_P == i
                decay = between(suffix[:, r : r + 1], far_, near_, r, earlier_rows=True)
                one = dot((decay * scores).astype(dtype), dy)
                du = one if du is None else jnp.where(s.lane(one.shape) < i * s.padded_P, du, one)
                # The gradient of the mixing matrix.
                d_mixing = jnp.where(visible, dot(jnp.where(mine, u, 0), dy, "ij,kj"), 0) * decay
                d_scores += d_mixing
                # The gradient of a token's log decay: of all that passes it, a sum without a difference.
                through = jnp.where(passed, dot((d_mixing * scores).astype(dtype), later), 0).sum(0, keepdims=True)
                whole = jnp.where(mine[:1], passing, 0).sum(1, keepdims=True)
                d_decay_[r : r + 1] = through + whole
            du += du_at_end
            # Sums over the channels of each head, as products that leave time in the lanes.
            of_head = jax.lax.broadcasted_iota(jnp.int32, (per_tile, s.tile), 0)
            of_head = (s.lane(of_head.shape) // s.padded_P == of_head).astype(dtype)
            ddt_[rows] = dot(of_head, (wide_x * du).astype(dtype), "ij,kj")
            to_end_[rows] = dot(of_head, (wide_u * du_at_end).astype(dtype), "ij,kj")
            from_start_[rows] = dot(of_head, (wide_dy * y_of_start).astype(dtype), "ij,kj")
            dx_[:, at] = (step * du + D_[:, at] * wide_dy).astype(dtype)
        d_scores_ref[...] = d_scores
        dB_ref[0, 0] = dB
        dC_ref[0, 0] = dC
        return 0

    if U == s.R:
        body(0, 0)
    else:
        jax.lax.fori_loop(0, s.R // U, body, 0)
    later = later.astype(jnp.float32)
    d_decay_ref[0, 0] += dot(from_start_ref[...], later) + dot(to_end_ref[...], 1 - later)
    d_scores = d_scores_ref[...].astype(dtype)
    dB_ref[0, 0] += dot(d_scores, C)
    dC_ref[0, 0] += dot(d_scores, B, "ji,jk")

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        start_ref[0, 0] = g_ref[...]
