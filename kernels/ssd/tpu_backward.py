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
    VMEM,
    Decays,
    Sizes,
    arguments,
    between,
    dot,
    fade,
    inward,
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
        (*arguments(B.shape[2]), "B K H N", "B T H", "B H P N"),
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
    D = jnp.broadcast_to(s.pad_heads(D[None]).reshape(s.J, s.R, 1), (s.J, s.R, s.Q))
    arrays = align(*inward(s, x, dt, log_decay, B, C), D, documents, states, dy, s.state_in(dh))
    chunks = dy.shape[1] // s.Q
    spec = s.specs(chunks, reverse=True)
    shape = jax.ShapeDtypeStruct
    rows = shape((batch, s.J, s.R, chunks * s.Q), jnp.float32)
    of_block = shape((batch, s.J, chunks * s.Q, s.N), jnp.float32)
    results = {
        "channels": [shape(dy.shape, x.dtype)],
        "rows": [rows, rows],
        "block": [of_block, of_block],
        "sums": [shape((batch, s.J, s.R, s.Q), jnp.float32)],
        "state": [shape(arrays[-1].shape, jnp.float32)],
    }
    names = "channels", "rows", "rows", "group", "group", "heads", "time", "states", "channels", "state"
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
            pltpu.VMEM((s.R // together(s), s.Q, together(s)), jnp.float32),
            *(pltpu.VMEM((s.R, s.Q), jnp.float32) for _ in range(2)),
            *(pltpu.VMEM((s.Q, s.Q), jnp.float32) for _ in range(2)),
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
    dD = s.cut_heads(dD.sum(-1).reshape(batch, -1))
    return s.cut_heads(dx[:, :T], channels=True), ddt, d_log_decay, dB[:, :, :T], dC[:, :, :T], dD, s.state_out(dh)


def together(s):
    """How many heads of a block are unrolled."""
    per_tile = s.tile // s.padded_P
    return max((U for U in range(per_tile, UNROLL + 1, per_tile) if s.R % U == 0), default=per_tile)


def _backward_kernel(
    s, x_ref, dt_ref, decay_ref, B_ref, C_ref, D_ref, documents_ref, h_ref, dy_ref, end_ref,
    dx_ref, ddt_ref, d_decay_ref, dB_ref, dC_ref, dD_ref, g_ref,
    far_ref, near_ref, prefix_ref, since_start_ref, to_end_ref, d_scores_ref, passed_ref,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        g_ref[...] = end_ref[...]
        dD_ref[...] = jnp.zeros_like(dD_ref)

    dtype = x_ref.dtype
    Q, P, B, C = s.Q, s.padded_P, B_ref[0, 0], C_ref[0, 0]
    U, per_tile = together(s), s.tile // P
    # Rows are the later tokens i, lanes the earlier tokens j.
    decays = Decays.of(decay_ref[0, 0], far_ref, near_ref)
    since_start_ref[...], to_end_ref[...] = decays.since_start, decays.to_end
    for g in range(s.R // U):
        prefix_ref[g] = decays.prefix[g * U : (g + 1) * U].T
    later = triangle(Q)  # [i, t]: t passes nothing later than i
    documents = jnp.broadcast_to(documents_ref[0], (Q, Q))
    # Where the decay is 0, x may be an overflow in another document, whose product must not be seen.
    passed_ref[...] = jnp.where(later & (documents == documents.T), 1.0, 0.0)
    scores = jnp.where(later, dot(C, B, "ij,kj"), 0)
    later = later.astype(jnp.float32)
    earlier, later = (1 - later).astype(dtype), later.astype(dtype)  # [j, t]: t passes what is earlier than it
    d_scores_ref[...] = jnp.zeros_like(d_scores_ref)
    dB_ref[...] = jnp.zeros_like(dB_ref)
    dC_ref[...] = jnp.zeros_like(dC_ref)

    def body(g, _):
        heads = pl.ds(pl.multiple_of(g * U, U), U)
        far_, near_, prefix = far_ref.at[:, heads], near_ref.at[:, heads], prefix_ref[g]
        dt, D, since_start, to_end = dt_ref[0, 0, heads], D_ref[0, heads], since_start_ref[heads], to_end_ref[heads]

        def tall(rows, tile):
            """A row of each head in all of its channels, [tile, Q]."""
            rows = rows[tile * per_tile : (tile + 1) * per_tile]
            return jnp.broadcast_to(rows[:, None], (per_tile, P, rows.shape[1])).reshape(s.tile, -1)

        def by_head(v):
            """The sum over the channels of each head."""
            return v.reshape(-1, P, v.shape[1]).sum(1)

        of_start, of_end, of_all, through, dD, start = ([] for _ in range(6))
        whole = jnp.broadcast_to(since_start[:, Q - 1 :], (U, s.N))
        for tile in range(U * P // s.tile):
            at = pl.ds(pl.multiple_of(g * U * P + tile * s.tile, s.tile), s.tile)
            h, end = h_ref[0, 0, at], g_ref[0, 0, at]
            narrow_end = end.astype(dtype)
            dy = dy_ref[0, :, at]
            narrow_dy = dy.T
            x, wide_dy = x_ref[0, :, at].T.astype(jnp.float32), narrow_dy.astype(jnp.float32)
            u = x * tall(dt, tile)

            # Of tokens on each other.
            mixed = []
            for i in range(per_tile):
                r = tile * per_tile + i
                mine = slice(i * P, (i + 1) * P)
                decay = between(prefix[:, r : r + 1], far_, near_, r)
                only_mine = jnp.concatenate([u[mine] if k == i else jnp.zeros((P, Q)) for k in range(per_tile)])
                d_mixing = fade(dot(dy, only_mine.astype(dtype)), decay)
                d_scores_ref[...] += d_mixing
                mixed.append(dot(narrow_dy[mine], (decay * scores).astype(dtype)))
                # The gradient of a token's log decay: of all that passes it, a sum without a difference.
                passing = dot((d_mixing * scores).astype(dtype), earlier)
                through.append(jnp.where(passed_ref[...] > 0, passing, 0).sum(0, keepdims=True))

            # Of tokens on the state at the end.
            fading = tall(to_end, tile)
            from_end = fade(dot(narrow_end, B, "ij,kj"), fading)
            of_end.append(by_head(u * from_end))
            dB_ref[0, 0] += dot((u * fading).astype(dtype), narrow_end, "ji,jk")
            du = jnp.concatenate(mixed) + from_end
            of_all.append(by_head(x * du))
            dx_ref[0, :, at] = (tall(dt, tile) * du + tall(D, tile) * wide_dy).astype(dtype).T
            dD.append(by_head(x * wide_dy))

            # Of the state at the start on tokens.
            fading = tall(since_start, tile)
            of_start.append(by_head(wide_dy * fade(dot(h, C, "ij,kj"), fading)))
            faded = (wide_dy * fading).astype(dtype)
            dC_ref[0, 0] += dot(faded, h, "ji,jk")
            end = fade(end, tall(whole, tile))
            g_ref[0, 0, at] = end + dot(faded, C)
            start.append(by_head(h * end))
        of_start, of_end, of_all, through, dD, start = map(
            jnp.concatenate, (of_start, of_end, of_all, through, dD, start)
        )
        ddt_ref[0, 0, heads] = of_all
        dD_ref[0, 0, heads] += dD
        d_decay = dot(of_start.astype(dtype), later) + dot(of_end.astype(dtype), earlier)
        d_decay_ref[0, 0, heads] = d_decay + through + start.sum(1, keepdims=True)
        return 0

    if U == s.R:
        body(0, 0)
    else:
        jax.lax.fori_loop(0, s.R // U, body, 0)
    d_scores = d_scores_ref[...].astype(dtype)
    dB_ref[0, 0] += dot(d_scores, C, "ji,jk")
    dC_ref[0, 0] += dot(d_scores, B)
