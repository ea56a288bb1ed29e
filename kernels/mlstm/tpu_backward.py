"""mLSTM for TPU, backwards: the chunks in reverse, the gradient of the memory in VMEM (see tpu.py).

A chunk is recomputed from its inputs and the memory at its start, but for h: the products of the gradients with v and
the memory, formed anyway, give dh · h.
"""

import functools
from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import tpu
from phyla.kernels.mlstm import tpu_chunk as chunks
from phyla.kernels.mlstm.tpu_chunk import FROM, RUN
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
            scratch_shapes=[pltpu.VMEM((call.heads, 1), jnp.float32)],
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
        dm_ref[...] = dm_end_ref[0, :, 0]

    heads, K, V = dC_ref.shape[1:]
    dtype = q_ref.dtype
    dot = functools.partial(chunks.dot, dtype)

    def head(r):
        keys, values = slice(r * K, (r + 1) * K), slice(r * V, (r + 1) * V)
        k, v = k_ref[0, :, keys], v_ref[0, :, values]
        C, n = C_start_ref[0, r, 0], n_start_ref[0, r, 0]
        dC, dn = dC_ref[0, r], dn_ref[0, r]
        chunk = chunks.Chunk(gates_ref[0, r, 0], scale)
        tiles: list[_Tile] = []
        for t in chunk.tiles:
            tile = yield from _read_tile(
                chunk, t, q_ref[0, t, keys], k, v, dh_ref[0, t, values], C, n, normalise, epsilon
            )
            later = jnp.concatenate([d.astype(dtype) for d in tile.d_product], 1)
            dq_ref[0, t, keys] = (dot(later, k[: t.stop], 1, 0) + tile.dq_start).astype(dq_ref.dtype)
            tiles.append(tile)
            yield
        dC_ = dC.astype(dtype)
        dk_end = chunks.times(chunk.to_end, dot(v, dC_, 1, 1) + dn)
        dv_end = chunks.times(chunk.to_end, dot(k, dC_, 1, 0))
        yield
        kept = _sum(k.astype(jnp.float32) * dk_end)  # by the memory at the end, of each token
        for at, s in enumerate(chunk.tiles):
            q, d_read = (jnp.concatenate(x) for x in zip(*((tile.q, tile.d_read) for tile in tiles[at:]), strict=True))
            d_product, product = (
                jnp.concatenate([getattr(tile, name)[at].astype(dtype) for tile in tiles[at:]])
                for name in ("d_product", "product")
            )
            dk_ref[0, s, keys] = (dot(d_product, q, 0, 0) + dk_end[s]).astype(dk_ref.dtype)
            dv_ref[0, s, values] = (dot(product, d_read, 0, 0) + dv_end[s]).astype(dv_ref.dtype)
            yield

        whole = jnp.sum(chunks.times(chunk.whole, dC * C.astype(jnp.float32))) + jnp.sum(
            chunks.times(chunk.whole, dn * n)
        )
        di, d_log_f = _gate_gradients(dot, chunk, tiles, kept, whole)
        if normalise:
            # exp(-m) is a factor of all that is read, and of norm - epsilon; m reaches back as far as it was kept.
            run, origin = chunk.row(RUN), chunk.row(FROM)
            dm = jnp.concatenate([_reaches(chunk, tiles, at, -epsilon) for at in range(len(tiles))], 1)
            dm += jnp.where(run == run[:, -1:], dm_ref[r : r + 1], 0)
            through = jnp.where(origin > 0, dm, 0)
            d_log_f += through
            di += jnp.where(origin < 0, dm, 0)
            dm_ref[r : r + 1] = through[:, :1]
        d_gates_ref[0, r, 0:1] = di
        d_gates_ref[0, r, 1:2] = d_log_f
        yield

        q, d_read = (jnp.concatenate(x) for x in zip(*((tile.q, tile.d_read) for tile in tiles), strict=True))
        q_wide = q.astype(jnp.float32)
        dC_ref[0, r] = chunks.times(chunk.whole, dC) + dot(chunk.read_start * q_wide, d_read, 0, 0)
        dn_ref[0, r] = chunks.times(chunk.whole, dn)
        if normalise:
            d_norm = jnp.concatenate([tile.d_norm for tile in tiles])
            dn_ref[0, r] += _sum(chunks.times(chunk.read_start, q_wide * d_norm), 0)

    chunks.in_turns(head, heads)


class _Tile(NamedTuple):
    """Of the tokens of tile t, all that is made of what they read; lists are by the tiles s <= t that wrote it."""

    q: jax.Array
    d_read: jax.Array  # gradient of what is read, before the division
    d_norm: jax.Array  # and of what is read of the normaliser, [t, 1]
    along: jax.Array  # dh · h / norm, [t, 1]
    product: list[jax.Array]  # [t, s]: what is left of s times q k
    d_product: list[jax.Array]  # [t, s]: its gradient times what is left of s
    passed: list[jax.Array]  # [t, s]: gradient of the logarithm of what is left of s
    dq_start: jax.Array  # gradient of q through the memory at the start
    passed_start: jax.Array  # gradient of the logarithm of what is left of that memory, [t, 1]


def _read_tile(chunk, t, q, k, v, dh, C, n, normalise, epsilon) -> Generator[None, None, _Tile]:
    dot = functools.partial(chunks.dot, q.dtype)
    q_wide, start = q.astype(jnp.float32), chunk.read_start[t]
    earlier = [s for s in chunk.tiles if s.start <= t.start]
    between = [chunk.between(t, s) for s in earlier]
    product = [chunks.times(b, dot(q, k[s], 1, 1)) for b, s in zip(between, earlier, strict=True)]
    yield
    norm = slope = along = d_norm = jnp.zeros((len(q), 1))
    d_read = dh
    if normalise:
        read = chunks.sums(dot, jnp.concatenate([p.astype(q.dtype) for p in product], 1))
        norm, slope = chunk.norm(t, read + chunks.times(start, chunks.sums(dot, q, n)), epsilon)
        norm = chunks.inverse(norm, q.dtype)
        d_read = (dh.astype(jnp.float32) * chunks.wide(norm, dh.shape[1])).astype(q.dtype)
        norm, slope = norm[:, :1], slope[:, :1]
    d_between, dq_start = [dot(d_read, v[s], 1, 1) for s in earlier], dot(d_read, C, 1, 1)
    yield
    if normalise:  # what is divided by is read like one more column of v, all ones
        along = _sum(sum(jnp.where(b > 0, p * d, 0) for b, p, d in zip(between, product, d_between, strict=True)))
        along = (along + chunks.times(start, _sum(q_wide * dq_start))) * norm
        d_norm = -along * slope
        d_between, dq_start = [d + d_norm for d in d_between], dq_start + d_norm * n
    dq_start = chunks.times(start, dq_start)
    return _Tile(
        q=q,
        d_read=d_read,
        d_norm=d_norm,
        along=along,
        product=product,
        d_product=[chunks.times(b, d) for b, d in zip(between, d_between, strict=True)],
        passed=[jnp.where(b > 0, p * d, 0) for b, p, d in zip(between, product, d_between, strict=True)],
        dq_start=dq_start,
        passed_start=_sum(q_wide * dq_start),
    )


def _gate_gradients(dot, chunk, tiles, kept, whole):
    """Gradients of the logarithms of what tokens write and of their decays, [1, L] each.

    The decay of token u acts on all that is read at t >= u of what was written at s < u. These are summed, not found
    as differences of running sums: those leave noise where little is passed on, and between documents.
    """
    size = len(chunk.causal)
    before = jnp.where(chunk.causal, 0.0, 1.0)  # [s, u]: s < u
    di, d_log_f = [], []
    for u, at in enumerate(chunk.tiles):
        here = tiles[u]
        below = [_sum(tile.passed[u], 0) for tile in tiles[u + 1 :]]  # read in later tiles, [1, s]
        diagonal = jnp.where(_diagonal(size), kept[at], 0)
        di.append(_sum(here.passed[u] + diagonal, 0) + sum(below))
        read_later = dot(here.passed[u], before, 1, 0) + here.passed_start
        read_later += sum(_sum(passed) for passed in here.passed[:u])
        total = _sum(jnp.where(chunk.causal, read_later, kept[at]), 0) + whole
        if below:
            rows = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (8, size), 0) == 0, sum(below), 0)
            total += dot(rows, before, 1, 0)[:1]
        total += sum(jnp.sum(tile.passed_start) for tile in tiles[u + 1 :])
        total += sum(jnp.sum(kept[s]) for s in chunk.tiles[:u])
        total += sum(jnp.sum(passed) for tile in tiles[u + 1 :] for passed in tile.passed[:u])
        d_log_f.append(total)
    return jnp.concatenate(di, 1), jnp.concatenate(d_log_f, 1)


def _reaches(chunk, tiles, at, factor):
    """The sum of factor · along over the tokens from each of tile `at` on for which m was kept, [1, s]."""
    s = chunk.tiles[at]
    total = 0.0
    for t, tile in zip(chunk.tiles[at:], tiles[at:], strict=True):
        same = chunk.column(RUN, t) == chunk.row(RUN, s)
        total += _sum(jnp.where(same & chunk.causal if t == s else same, factor * tile.along, 0), 0)
    return total


def _sum(x, axis=1):
    return jnp.sum(x, axis, keepdims=True)


def _diagonal(L):
    return jax.lax.broadcasted_iota(jnp.int32, (L, L), 0) == jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)
