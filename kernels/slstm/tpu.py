"""sLSTM for TPU: one kernel goes through time, with the recurrent connections of its heads in VMEM all the while.

The mathematics is that of xla.py. A token is one small product a head and then arithmetic on its cells, one after the
other: what can be done is to have other heads' products meanwhile, so a block has as many heads as fit. The grid is
(blocks of heads, blocks of the batch, chunks of time), and inside a chunk a loop goes through its tokens.

Kept for the backward pass, beside inputs and h: the state at the start of every chunk, 16 bytes a cell, that is
16 H P / L bytes a token with L tokens of a sequence in a chunk (ROWS / B). The backward pass itself makes copies of the
gates, h and the gradients of both that have time first: 10 H P numbers a token, in the dtype of the gates.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from phyla.kernels import tpu
from phyla.kernels.arguments import align
from phyla.kernels.partition import per_device
from phyla.kernels.slstm.tpu_backward import run_backward
from phyla.kernels.slstm.tpu_blocks import ROWS, Sizes, dot, wide
from phyla.kernels.slstm.xla import advance, log_sigmoid, slstm_xla, stabiliser


def slstm_tpu(i, f, z, o, R, bias, initial_state, resets, *, rows: int = ROWS):
    """Run with float32 state and sums, the products in the dtype of the gates. `resets` is bool [B, T] or None.

    One token is decoded by the XLA implementation: reading R bounds it. `rows` is the number of tokens in a chunk, of
    all sequences together.

    Raises:
        Unfit: the recurrent connections of one head are too large for VMEM.
    """
    if initial_state[0].dtype != jnp.float32:
        raise ValueError("slstm: 'tpu' computes in float32, but i is float64; cast it or use 'reference'")
    if i.shape[1] == 1:
        return slstm_xla(i, f, z, o, R, bias, initial_state, resets)
    dtype = jnp.result_type(i, f, z, o)
    Sizes.of(i, dtype, rows, resets is not None)  # raises
    gates = tuple(gate.astype(dtype) for gate in (i, f, z, o))
    h, state = _scan(rows, gates, R, bias, tuple(initial_state), resets)
    return h.astype(i.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(rows, gates, R, bias, state, resets) -> tuple[jax.Array, tuple]:
    h, *state = _run_forward(rows, False, gates, R, bias, state, resets)
    return h, tuple(state)


def _forward(rows, gates, R, bias, state, resets):
    h, *end, starts = _run_forward(rows, True, gates, R, bias, state, resets)
    return (h, tuple(end)), (gates, R, bias, state, resets, h, starts, end[:2])


def _backward(rows, saved, cotangents):
    gates, R, bias, (c, n, *_), resets, h, starts, (c_end, n_end) = saved
    dy, (dc, dn, dh, dm) = cotangents
    dm -= dc * c_end + dn * n_end  # at constant c exp(m) and n exp(m), see xla.py
    *d_gates, dR, d_bias, dc, dn, dh, dm = run_backward(rows, gates, R, bias, resets, h, starts, dy, (dc, dn, dh, dm))
    dm += dc * c + dn * n
    return tuple(d_gates), dR.astype(R.dtype), d_bias.astype(bias.dtype), (dc, dn, dh, dm), None


_scan.defvjp(_forward, _backward)


def _run_forward(rows, keep, gates, R, bias, state, resets):
    """h, the four parts of the state and, if `keep`, the states at the starts of chunks [N, 4, B, H, P]."""

    def run(i, f, z, o, R, bias, c, n, h, m, resets):
        sizes = Sizes.of(i, i.dtype, rows, resets is not None)
        tokens = [sizes.tokens(gate) for gate in (i, f, z, o)]
        begin = sizes.state((c, n, h, stabiliser(n, m)))
        begin = begin.at[3].set(stabiliser(begin[1], begin[3]))  # of the padding too
        names = "tokens tokens tokens tokens R bias state" + " begins" * sizes.resets
        options = sizes.options(names, "tokens state" + " starts" * keep, reverse=False, products=1)
        h, end, *starts = tpu.pallas_call(
            functools.partial(_kernel, sizes),
            options.pop("out_shape"),
            *align(*tokens, sizes.connections(R), sizes.bias(bias), begin, *sizes.begins(resets)),
            name="slstm_forward",
            **options,
        )
        heads = [s.reshape(*s.shape[:3], sizes.H, -1) for s in starts]
        return sizes.tokens_back(h), *sizes.state_back(end), *heads

    arguments = ["B T H P"] * 4 + ["G H P Q", "G H P"] + ["B H P"] * 4 + ["B T"]
    results = ["B T H P"] + ["B H P"] * 4 + ["N S B H P"] * keep
    return per_device(run, arguments, results)(*gates, R, bias, *state, resets)


def _kernel(sizes, i_ref, f_ref, z_ref, o_ref, R_ref, bias_ref, begin_ref, *refs):
    """The block of `state_ref` is the state between chunks; inside one, the loop carries it."""
    begins_ref, h_ref, state_ref, *starts = refs if sizes.resets else (None, *refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = begin_ref[...]

    for starts_ref in starts:
        starts_ref[...] = state_ref[...]

    def token(t, state):
        return tuple(head(r, t, *state[r]) for r in range(sizes.heads))

    def head(r, t, c, n, h, m):
        at = sizes.head(r)
        if begins_ref is not None:
            begins = wide(begins_ref[t], sizes.padded_P)
            h, m = jnp.where(begins, 0, h), jnp.where(begins, -jnp.inf, m)
        recurrent = jnp.split(dot(h, R_ref[r], 1, 0), 4, axis=-1)
        i, f, z, o = (
            ref[t, :, at].astype(jnp.float32) + recurrent[g] + bias_ref[g : g + 1, at]
            for g, ref in enumerate((i_ref, f_ref, z_ref, o_ref))
        )
        (c, n, m), _ = advance((c, n, m), i, log_sigmoid(f), jnp.tanh(z))
        h = jax.nn.sigmoid(o) * c / n
        h_ref[t, :, at] = h.astype(h_ref.dtype)
        return c, n, h, m

    before = tuple(tuple(state_ref[s, :, sizes.head(r)] for s in range(4)) for r in range(sizes.heads))
    after = jax.lax.fori_loop(0, sizes.steps(pl.program_id(2)), token, before)
    for r, parts in enumerate(after):
        for s, part in enumerate(parts):
            state_ref[s, :, sizes.head(r)] = part
