"""sLSTM for TPU, backwards: the chunks in reverse, the gradient of the state in VMEM (see tpu.py).

h being known, the gates of a whole chunk are one product, and so is its part of the gradient of R. Its cells go
forwards through the chunk once more, without a product, and then the gradient goes backwards.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import tpu
from phyla.kernels.arguments import align
from phyla.kernels.partition import per_device
from phyla.kernels.slstm.tpu_blocks import Sizes, dot, wide
from phyla.kernels.slstm.xla import advance, log_sigmoid


def run_backward(rows, gates, R, bias, resets, h, starts, dy, d_state):
    """Gradients of i, f, z, o, R, bias and of c, n, h, m before the first token (m with c exp(m) constant)."""

    def run(i, f, z, o, R, bias, resets, h, starts, dy, dc, dn, dh, dm):
        sizes = Sizes.of(i, i.dtype, rows, resets is not None)
        tokens = [sizes.tokens(each) for each in (i, f, z, o, h, dy)]
        starts = starts.reshape(*starts.shape[:3], -1)
        names = "tokens tokens tokens tokens tokens tokens R bias starts state" + " begins" * sizes.resets
        results = "tokens tokens tokens tokens dR d_bias state"
        options = sizes.options(names, results, reverse=True, products=3)
        block = sizes.L, sizes.rows, sizes.lanes
        given = sizes.connections(R), sizes.bias(bias), starts, sizes.state((dc, dn, dh, dm)), *sizes.begins(resets)
        *d_gates, dR, d_bias, d_state = tpu.pallas_call(
            functools.partial(_kernel, sizes),
            options.pop("out_shape"),
            *align(*tokens, *given),
            scratch_shapes=[
                pltpu.VMEM((4, *block), jnp.float32),
                pltpu.VMEM(block, jnp.float32),
                pltpu.VMEM((2, sizes.L + 1, *block[1:]), jnp.float32),
                pltpu.VMEM((sizes.L * sizes.rows, sizes.lanes), sizes.dtype),
            ],
            name="slstm_backward",
            **options,
        )
        d_bias = d_bias.reshape(*d_bias.shape[:2], sizes.H, -1)[..., : sizes.P]
        dR = jax.vmap(sizes.connections_back)(dR)
        return *map(sizes.tokens_back, d_gates), dR, d_bias, *sizes.state_back(d_state)

    token, state = "B T H P", "B H P"
    arguments = [token] * 4 + ["G H P Q", "G H P", "B T", token, "N S B H P", token] + [state] * 4
    results = [token] * 4 + ["B G H P Q", "B G H P"] + [state] * 4  # of R and bias, by blocks of the batch
    call = per_device(run, arguments, results)
    *d_gates, dR, d_bias, dc, dn, dh, dm = call(*gates, R, bias, resets, h, starts, dy, *d_state)
    return *d_gates, dR.sum(0), d_bias.sum(0), dc, dn, dh, dm


def _kernel(sizes, i_ref, f_ref, z_ref, o_ref, h_ref, dy_ref, R_ref, bias_ref, start_ref, d_end_ref, *refs):
    """The blocks of dR_ref, d_bias_ref and d_state_ref are the sums and the state's gradient while chunks go by.

    Scratch: i, f, tanh z and σ(o), of which what was written replaces i; what was kept; c and n before every token
    and after the last; h before every token.
    """
    begins_ref, *refs = refs if sizes.resets else (None, *refs)
    *d_gate_refs, dR_ref, d_bias_ref, d_state_ref, gates_ref, kept_ref, cells_ref, before_ref = refs
    L, rows, P = sizes.L, sizes.rows, sizes.padded_P
    steps = sizes.steps(pl.num_programs(2) - 1 - pl.program_id(2))

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_ref[...] = d_end_ref[...]
        dR_ref[...] = jnp.zeros_like(dR_ref)
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)
        if sizes.T % L:
            for ref in d_gate_refs:
                ref[...] = jnp.zeros_like(ref)

    for r in range(sizes.heads):
        at = sizes.head(r)
        before = jnp.concatenate([start_ref[2:3, :, at], h_ref[: L - 1, :, at].astype(jnp.float32)])
        if begins_ref is not None:
            before = jnp.where(wide(begins_ref[...], P), 0, before)
        before_ref[:, at] = before.reshape(L * rows, P).astype(sizes.dtype)
        recurrent = dot(before_ref[:, at], R_ref[r], 1, 0).reshape(L, rows, 4 * P)
        for g, (ref, function) in enumerate(zip((i_ref, f_ref, z_ref, o_ref), _FUNCTIONS, strict=True)):
            gate = ref[:, :, at].astype(jnp.float32) + recurrent[:, :, g * P : (g + 1) * P] + bias_ref[g : g + 1, at]
            gates_ref[g, :, :, at] = function(gate)

    cells_ref[0, 0], cells_ref[1, 0] = start_ref[0], start_ref[1]

    def recompute(t, cell):
        c, n, m = cell
        if begins_ref is not None:
            m = jnp.where(wide(begins_ref[t], sizes.lanes), -jnp.inf, m)
        cell, (keep, write) = advance((c, n, m), gates_ref[0, t], log_sigmoid(gates_ref[1, t]), gates_ref[2, t])
        gates_ref[0, t], kept_ref[t] = write, keep
        cells_ref[0, t + 1], cells_ref[1, t + 1] = cell[:2]
        return cell

    jax.lax.fori_loop(0, steps, recompute, (start_ref[0], start_ref[1], start_ref[3]))

    def token(k, d_state):
        return tuple(head(r, steps - 1 - k, *d_state[r]) for r in range(sizes.heads))

    def head(r, t, dc, dn, dh, dm):
        at = sizes.head(r)
        write, f, tanh_z, sigmoid_o = (gates_ref[g, t, :, at] for g in range(4))
        keep = kept_ref[t, :, at]
        c, n = cells_ref[0, t + 1, :, at], cells_ref[1, t + 1, :, at]
        dh += dy_ref[t, :, at].astype(jnp.float32)
        ratio = c / n
        dc_here = dh * sigmoid_o / n
        dc += dc_here
        dn -= dc_here * ratio
        began = write == 1  # m is this token's i
        d_gates = (
            write * (dc * tanh_z + dn) + jnp.where(began, dm, 0),
            (keep * (dc * cells_ref[0, t, :, at] + dn * cells_ref[1, t, :, at]) + jnp.where(began, 0, dm))
            * jax.nn.sigmoid(-f),
            dc * write * (1 - tanh_z * tanh_z),
            dh * ratio * sigmoid_o * (1 - sigmoid_o),
        )
        for ref, d_gate in zip(d_gate_refs, d_gates, strict=True):
            ref[t, :, at] = d_gate.astype(ref.dtype)
        dh = dot(jnp.concatenate(d_gates, -1), R_ref[r], 1, 1)
        if begins_ref is not None:
            dh = jnp.where(wide(begins_ref[t], P), 0, dh)
        return dc * keep, dn * keep, dh, jnp.where(began, 0, dm)

    end = tuple(tuple(d_state_ref[s, :, sizes.head(r)] for s in range(4)) for r in range(sizes.heads))
    for r, parts in enumerate(jax.lax.fori_loop(0, steps, token, end)):
        at = sizes.head(r)
        for s, part in enumerate(parts):
            d_state_ref[s, :, at] = part
        for g, ref in enumerate(d_gate_refs):
            d_gate = ref[:, :, at].astype(jnp.float32).reshape(L * rows, P)
            dR_ref[r, :, g * P : (g + 1) * P] += dot(before_ref[:, at], d_gate.astype(sizes.dtype), 0, 0)
            d_bias_ref[g : g + 1, at] += jnp.sum(d_gate, 0, keepdims=True)


_FUNCTIONS = (lambda i: i, lambda f: f, jnp.tanh, jax.nn.sigmoid)
"""Of i, f, z and o: what of them the backward sweep needs."""
