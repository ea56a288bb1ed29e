"""Selective scan for TPUs, the gradient: chunks in reverse, each twice, first forwards for its states.

With g the gradient of the state after a token, which starts as that of the state before the next:

    g += C dy     d(dt x) = B . g     dB = sum over channels of dt x g     dC = sum over channels of h dy
    g *= decay    d(dt A) = g h_before

dB and dC want sums over registers, a product a state and token. Stores and strided loads turn eight states by eight
rows around, so that rows add up as whole registers; blocks of channels add up in VMEM; lanes come last.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.arguments import align
from phyla.kernels.selective_scan.tpu_layout import Sizes, blocks, bounded, channels, weights
from phyla.kernels.tpu import LANES, SUBLANES, pallas_call


def backward(chunk, x, dt, A, B, C, D, resets, starts, dy, d_final):
    """Gradients of x, dt, A, B, C, D and the initial state, float32 unless by channel and token.

    Those of A and D have the batch in front; those of B and C one more axis, of 1, behind.
    """
    sizes = Sizes.of(x, B, C, chunk)
    tokens, A_blocks, D_row = weights(sizes, A, B, C, D, resets)
    inputs = align(x, dt, dy, tokens, A_blocks, D_row, starts, blocks(d_final))
    results = {"inputs": x.dtype, "inputs ": dt.dtype, "state": None, "dD": None, "sums": None, "state ": None}
    registers = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    L, N, tile = sizes.chunk, sizes.N, (SUBLANES, LANES)
    turned = registers((L // SUBLANES, SUBLANES * SUBLANES, LANES))
    dx, ddt, dA, dD, sums, d_initial = pallas_call(
        functools.partial(_kernel, sizes),
        tuple(sizes.shape(name.strip(), len(x), dtype or jnp.float32) for name, dtype in results.items()),
        *inputs,
        in_specs=[
            sizes.spec(name, reverse=True)
            for name in ("inputs", "inputs", "inputs", "tokens", "A", "D", "starts", "state")
        ],
        out_specs=tuple(sizes.spec(name.strip(), reverse=True) for name in results),
        scratch_shapes=[
            turned,
            turned,
            turned,
            *[registers((SUBLANES * SUBLANES, LANES))] * 2,
            registers((L + 1, N, *tile)),
            registers((2, SUBLANES, sizes.rows * SUBLANES, LANES)),
            registers((2, sizes.rows // SUBLANES, L, *tile)),
            registers((L // SUBLANES, sizes.columns, *tile)),
        ],
        **sizes.options(len(x), "selective_scan_backward", 20),
    )
    sums = jnp.moveaxis(sums.reshape(len(x), sizes.chunks, 2, sizes.rows, L), 2, 0)[:, :, :, :N]
    dB, dC = jnp.swapaxes(sums, 3, 4).reshape(2, len(x), -1, N, 1)[:, :, : sizes.T]
    dD = dD.reshape(len(x), sizes.K, SUBLANES, SUBLANES, LANES).sum(3).reshape(len(x), -1)[:, : sizes.D]
    return dx, ddt, channels(dA, sizes.D), dB, dC, dD, channels(d_initial, sizes.D)


def _kernel(sizes, x_ref, dt_ref, dy_ref, tokens_ref, A_ref, D_ref, starts_ref, d_final_ref, *rest):
    """One chunk of one block of channels; dh_ref is the gradient of the state from chunk to chunk."""
    dx_ref, ddt_ref, dA_ref, dD_ref, sums_ref, dh_ref, *scratch = rest
    dt_s, u_s, dy_s, du_s, de_s, h_s, products_s, sums_s, spread_s = scratch
    k = pl.program_id(2)
    c = sizes.chunks - 1 - pl.program_id(1)
    eights = sizes.chunk // SUBLANES

    @pl.when(pl.program_id(1) == 0)
    def _():
        dh_ref[0, k] = d_final_ref[0, k]
        dA_ref[0, k] = jnp.zeros_like(dA_ref[0, k])
        dD_ref[0, k] = jnp.zeros_like(dD_ref[0, k])

    @pl.when(k == 0)
    def _():
        sizes.spread(tokens_ref, spread_s)
        sums_s[...] = jnp.zeros_like(sums_s)

    h_s[0] = starts_ref[0, 0, 0]

    def recompute(i, _):
        first = pl.multiple_of(i * SUBLANES, SUBLANES)
        x, dt, dy = (sizes.load(ref, first, c) for ref in (x_ref, dt_ref, dy_ref))
        dt, u, dy = sizes.decaying(dt, spread_s, first), bounded(dt * x), bounded(dy)
        for v, ref in ((dt, dt_s), (u, u_s), (dy, dy_s)):
            sizes.turn(v, ref.at[i], 0)
        dt, u = (ref[i].reshape(SUBLANES, SUBLANES, LANES) for ref in (dt_s, u_s))
        for states in sizes.groups:
            A, h = A_ref[k, states], list(h_s[first, states])
            for s in range(SUBLANES):
                B, _ = sizes.row(spread_s, i, s, states)
                for n in range(len(h)):
                    h[n] = jnp.exp2(dt[s] * A[n]) * h[n] + u[s] * B[n]
                h_s[first + s + 1, states] = jnp.stack(h)

    jax.lax.fori_loop(0, eights, recompute, None)

    def differentiate(i, _):
        i = eights - 1 - i
        first = pl.multiple_of(i * SUBLANES, SUBLANES)
        dt, u, dy = (ref[i].reshape(SUBLANES, SUBLANES, LANES) for ref in (dt_s, u_s, dy_s))
        du, de = [jnp.zeros((SUBLANES, LANES))] * SUBLANES, [jnp.zeros((SUBLANES, LANES))] * SUBLANES
        for states in sizes.groups:
            A, dA, g = A_ref[k, states], list(dA_ref[0, k, states]), list(dh_ref[0, k, states])
            after = h_s[first + SUBLANES, states]
            for s in reversed(range(SUBLANES)):
                B, C = sizes.row(spread_s, i, s, states)
                earlier = h_s[first + s, states]
                for n in range(len(g)):
                    g[n] += C[n] * dy[s]
                    du[s] += g[n] * B[n]
                    at = pl.ds((states.start + n) * SUBLANES, SUBLANES)
                    products_s[0, s, at, :] = g[n] * u[s]
                    products_s[1, s, at, :] = after[n] * dy[s]
                    g[n] *= jnp.exp2(dt[s] * A[n])
                    d_exponent = g[n] * earlier[n]
                    dA[n] += d_exponent * dt[s]
                    de[s] += d_exponent * A[n]
                after = earlier
            dA_ref[0, k, states] = jnp.stack(dA)
            dh_ref[0, k, states] = jnp.stack(g)
        for s in range(SUBLANES):
            sizes.store(du[s], du_s, s)
            sizes.store(de[s], de_s, s)
            for m in range(2):
                for q in range(sizes.rows // SUBLANES):
                    at = (pl.ds(q * SUBLANES * SUBLANES + j, SUBLANES, stride=SUBLANES) for j in range(SUBLANES))
                    sums_s[m, q, first + s] += sum(products_s[m, s, rows, :] for rows in at)
        x, dt, dy = (sizes.load(ref, first, c) for ref in (x_ref, dt_ref, dy_ref))
        du = sizes.turned(du_s, 0)
        rows = pl.ds(first, SUBLANES)
        dx_ref[0, rows, :] = (du * dt + D_ref[...] * dy).astype(dx_ref.dtype)
        ddt_ref[0, rows, :] = (du * x + math.log(2) * sizes.turned(de_s, 0)).astype(ddt_ref.dtype)
        dD = dy * x
        for j in range(SUBLANES):
            dD_ref[0, k, pl.ds(j * SUBLANES, SUBLANES), :] += dD[:, j * LANES : (j + 1) * LANES]

    jax.lax.fori_loop(0, eights, differentiate, None)

    @pl.when(k == sizes.K - 1)
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, sizes.chunk), 1)
        for m in range(2):
            for q in range(sizes.rows // SUBLANES):

                def put(t, sums, m=m, q=q):
                    return jnp.where(lane == t, jnp.sum(sums_s[m, q, t], axis=1, keepdims=True), sums)

                at = pl.ds((m * sizes.rows // SUBLANES + q) * SUBLANES, SUBLANES)
                sums_ref[0, 0, at, :] = jax.lax.fori_loop(0, sizes.chunk, put, jnp.zeros(lane.shape, jnp.float32))
