"""sLSTM for Hopper: one thread block runs the time of one head for eight rows of the batch.

The recurrent matrices are in shared memory and the state in registers for the whole sequence: a token is one product
[4 P, P] x [P, 8] on the matrix unit, and arithmetic on [P, 8] cells. Time is bound by the latency of a token, not by
any unit. A float32 is three parts of bfloat16, as in gpu_attention.py.

Backward, the gates of all tokens come from one product over all of time in XLA, since the forward pass wrote every h,
and so do the gradients of R and the bias. What is left for the kernel are the cells, computed again 4 tokens at a time
from those before them (kept: 3 bytes a token and cell), and the sweep back, a product [P, 4 P] x [4 P, 8] a token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.gpu import kernel, load, pad, store
from phyla.kernels.gpu_attention import SQUARE, fit_chip, operand, parts, product, put, rows, turn
from phyla.kernels.partition import per_device
from phyla.kernels.slstm.xla import advance, log_sigmoid, slstm_xla, stabiliser

CHUNK = 4
"""Tokens between saved cells; their cells are in SMEM at a time."""
ROWS = 8
"""Of the batch in a thread block: the narrowest product of the matrix unit."""
CELLS = 64
"""A multiple of them makes the rows of a product."""
CONNECTIONS = 2**17
"""Bytes at most for the R of one head, of the 227 KB that a block has."""
BY_ROW = SQUARE.reduce(0)


def slstm_gpu(i, f, z, o, R, bias, initial_state, resets):
    """Run in float32. `resets` is bool [B, T] or None. One token is bound by memory, and runs in XLA.

    Raises:
        Unfit: more cells a head than 128 in bfloat16, 64 in float32; or a chip other than Hopper.
    """
    if initial_state[0].dtype != jnp.float32:
        raise ValueError("slstm: 'gpu' computes in float32, but i is float64; cast it or use 'reference'")
    fit_chip("slstm")
    P = i.shape[3]
    if (size := 8 * parts(i.dtype) * (P + -P % CELLS) ** 2) > CONNECTIONS:
        raise Unfit(f"R of one head of {P} cells is {size >> 10} KB, and shared memory holds {CONNECTIONS >> 10} KB")
    if i.shape[1] == 1:
        return slstm_xla(i, f, z, o, R, bias, initial_state, resets)
    y, state = _scan((i, f, z, o), R, bias, tuple(initial_state), resets)
    return y.astype(i.dtype), state


@jax.custom_vjp
def _scan(gates, R, bias, state, resets) -> tuple[jax.Array, tuple]:
    return _forward(gates, R, bias, state, resets)[0]


def _forward(gates, R, bias, state, resets):
    arguments = (*("B T H P",) * 4, "G H P Q", "G H P", *("B H P",) * 4, "B T")
    results = ("B T H P", *("B H P",) * 3, "B H N S P R")
    y, c, n, m, cells = per_device(_run_forward, arguments, results)(*gates, R, bias, *state, resets)
    return (y, (c, n, y[:, -1], m)), (gates, R, bias, state, resets, y, cells, c, n)


def _backward(saved, cotangents):
    gates, R, bias, (c, n, h, _), resets, y, cells, c_end, n_end = saved
    dy, (dc, dn, dh, dm) = cotangents
    dm -= dc * c_end + dn * n_end  # at constant c exp(m) and n exp(m), see xla.py
    before = jnp.concatenate([h[:, None], y[:, :-1]], 1)
    if resets is not None:
        before = jnp.where(resets[:, :, None, None], 0, before)
    recurrent = jnp.einsum("bthp,ghpq->gbthq", before, R.astype(jnp.float32), precision="highest")
    whole = (gate + r + b for gate, r, b in zip(gates, recurrent, bias.astype(jnp.float32), strict=True))
    arguments = (*("B T H P",) * 5, "G H P Q", "B H N S P R", *("B H P",) * 3, "B T")
    results = (*("B T H P",) * 4, *("B H P",) * 4)
    # R is cast as the forward pass has it.
    R_ = R.astype(gates[0].dtype)
    run = per_device(_run_backward, arguments, results)
    *d_gates, dc, dn, dh, dm = run(*whole, dy.at[:, -1].add(dh), R_, cells, dc, dn, dm, resets)
    dm += dc * c + dn * n
    dR = jnp.stack([jnp.einsum("bthp,bthq->hpq", before, d, precision="highest") for d in d_gates])
    d_bias = jnp.stack([d.sum((0, 1)) for d in d_gates])
    d_gates = tuple(d.astype(gate.dtype) for d, gate in zip(d_gates, gates, strict=True))
    return d_gates, dR.astype(R.dtype), d_bias.astype(bias.dtype), (dc, dn, dh, dm), None


_scan.defvjp(_forward, _backward)


def _run_forward(i, f, z, o, R, bias, c, n, h, m, resets):
    (B, T, H, P), dtype = i.shape, i.dtype
    tokens = _gates((gate + b for gate, b in zip((i, f, z, o), bias.astype(jnp.float32), strict=True)))
    state = jnp.stack([_tiles(s[:, None])[:, :, 0] for s in (c, n, h, stabiliser(n, m))], 2)
    resets = _row_resets(resets)
    chunks, width = tokens.shape[2] // CHUNK, tokens.shape[4]

    def body(*refs):
        tokens_ref, R_ref, state_ref, *resets_refs, y_ref, end_ref, cells_ref, R_s, h_s, recurrent_s = refs
        b, head = jax.lax.axis_index("b"), jax.lax.axis_index("h")
        _put_connections(R_s, R_ref, head)

        def chunk(k, state):
            for s, cell in enumerate(state[:3]):
                store(cells_ref.at[b, head, k, s], cell)

            def step(j, state):
                *cell, h = state
                t = k * CHUNK + j
                cell, h = _begin(cell, h, resets_refs, b, t, width)
                put(turn(h_s), h)
                plgpu.commit_smem()
                store(recurrent_s, product(turn(R_s), turn(h_s)))
                i, f, z, o = (
                    load(tokens_ref.at[b, head, t, g], SQUARE) + load(recurrent_s.at[_gate(g, width)], SQUARE)
                    for g in range(4)
                )
                cell, _ = advance(cell, i, log_sigmoid(f), jnp.tanh(z))
                h = _sigmoid(o) * cell[0] / cell[1]
                store(y_ref.at[b, head, t], h)
                plgpu.commit_smem()
                return *cell, h

            return jax.lax.fori_loop(0, CHUNK, step, state)

        c, n, h, m = (load(state_ref.at[b, head, s], SQUARE) for s in range(4))
        c, n, m, h = jax.lax.fori_loop(0, chunks, chunk, (c, n, m, h))
        for s, cell in enumerate((c, n, m)):
            store(end_ref.at[b, head, s], cell)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batches, tile = tokens.shape[0], (width, ROWS)
    out = (
        shape((batches, H, chunks * CHUNK, *tile)),
        shape((batches, H, 3, *tile)),
        shape((batches, H, chunks, 3, *tile)),
    )
    scratch = operand(ROWS, width, dtype), plgpu.SMEM((4 * width, ROWS), jnp.float32)
    y, end, cells = _call("slstm_forward", body, out, (tokens, _connections(R), state, resets), dtype, scratch)
    c, n, m = (_untile(end[:, :, s, None], B, P)[:, 0] for s in range(3))
    return _untile(y, B, P)[:, :T], c, n, m, cells


def _run_backward(i, f, z, o, dy, R, cells, dc, dn, dm, resets):
    """Of gates that have all their terms."""
    (B, T, _, P), dtype = i.shape, R.dtype
    tokens, dy = _gates((i, f, z, o)), _tiles(pad(dy, 1, CHUNK))
    ends = jnp.stack([_tiles(d[:, None])[:, :, 0] for d in (dc, dn, dm)], 2)
    resets = _row_resets(resets)
    chunks, width = tokens.shape[2] // CHUNK, tokens.shape[4]

    def body(*refs):
        tokens_ref, R_ref, dy_ref, cells_ref, ends_ref, *resets_refs, d_ref, start_ref, R_s, d_s, cells_s = refs
        b, head = jax.lax.axis_index("b"), jax.lax.axis_index("h")
        _put_connections(R_s, R_ref, head)

        def token(t, *gates):
            return (load(tokens_ref.at[b, head, t, g], SQUARE) for g in gates)

        def chunk(done, carry):
            k = chunks - 1 - done

            def recompute(j, cell):
                i, f, z = token(k * CHUNK + j, 0, 1, 2)
                cell, _ = _begin(cell, None, resets_refs, b, k * CHUNK + j, width)
                before, (cell, kept) = cell[:2], advance(cell, i, log_sigmoid(f), jnp.tanh(z))
                for s, v in enumerate((*before, *kept)):
                    store(cells_s.at[j, s], v)
                return cell

            jax.lax.fori_loop(0, CHUNK, recompute, tuple(load(cells_ref.at[b, head, k, s], SQUARE) for s in range(3)))

            def step(done, carry):
                dc, dn, dm, dh = carry
                j = CHUNK - 1 - done
                t = k * CHUNK + j
                f, z, o = token(t, 1, 2, 3)
                c_before, n_before, keep, write = (load(cells_s.at[j, s], SQUARE) for s in range(4))
                tanh_z, sigmoid_o = jnp.tanh(z), _sigmoid(o)
                c, n = keep * c_before + write * tanh_z, keep * n_before + write
                dh += load(dy_ref.at[b, head, t], SQUARE)
                do = dh * (c / n) * sigmoid_o * (1.0 - sigmoid_o)
                dc_here = dh * sigmoid_o / n
                dc += dc_here
                dn -= dc_here * (c / n)
                dz = dc * write * (1.0 - tanh_z * tanh_z)
                began = write == 1.0  # m is this token's i
                di = write * (dc * tanh_z + dn) + jnp.where(began, dm, 0.0)
                dm = jnp.where(began, 0.0, dm)
                df = (keep * (dc * c_before + dn * n_before) + dm) * _sigmoid(-f)
                for g, d in enumerate((di, df, dz, do)):
                    store(d_ref.at[b, head, t, g], d)
                    put([d_part.at[:, _gate(g, width)].T for d_part in d_s], d)
                plgpu.commit_smem()
                dh = product(R_s, turn(d_s))
                plgpu.commit_smem()
                _, dh = _begin((dh,) * 3, dh, resets_refs, b, t, width)
                return dc * keep, dn * keep, dm, dh

            return jax.lax.fori_loop(0, CHUNK, step, carry)

        dc, dn, dm = (load(ends_ref.at[b, head, s], SQUARE) for s in range(3))
        nothing = plgpu.layout_cast(jnp.zeros((width, ROWS), jnp.float32), SQUARE)
        carry = jax.lax.fori_loop(0, chunks, chunk, (dc, dn, dm, nothing))
        for s, d in enumerate(carry):
            store(start_ref.at[b, head, s], d)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = shape(tokens.shape), shape((*tokens.shape[:2], 4, *tokens.shape[4:]))
    arguments = tokens, _connections(R), dy, cells, ends, resets
    scratch = (operand(ROWS, 4 * width, dtype), plgpu.SMEM((CHUNK, 4, width, ROWS), jnp.float32))
    d, start = _call("slstm_backward", body, out, arguments, dtype, scratch)
    d_gates = (_untile(d[:, :, :, g], B, P)[:, :T] for g in range(4))
    dc, dn, dm, dh = (_untile(start[:, :, s, None], B, P)[:, 0] for s in range(4))
    return *d_gates, dc, dn, dh, dm


def _call(name, body, out, arguments, dtype, scratch):
    """One thread block for every head and eight rows of the batch."""
    tokens = arguments[0]
    batches, H, T, _, P, _ = tokens.shape
    arguments = [v for v in arguments if v is not None]
    moved = sum(v.size * v.dtype.itemsize for v in (*arguments, *out))
    return kernel(
        body,
        out,
        *arguments,
        grid=(batches, H),
        grid_names=("b", "h"),
        kernel_name=name,
        scratch_types=(operand(P, 4 * P, dtype), *scratch),
        cost_estimate=pl.CostEstimate(
            flops=batches * H * T * 8 * P * P * ROWS, transcendentals=2 * tokens.size, bytes_accessed=moved
        ),
    )


def _put_connections(R_s, R_ref, head):
    for g in range(4):
        put([R_part.at[:, _gate(g, R_ref.shape[2])] for R_part in R_s], load(R_ref.at[g, head], SQUARE))
    plgpu.commit_smem()


def _gate(g, width):
    """Its place among the four, side by side."""
    return pl.ds(g * width, width)


def _begin(cell, h, resets_refs, b, t, width):
    """Where a document begins nothing is kept: m is -inf, and h is 0."""
    if not resets_refs:
        return tuple(cell), h
    c, n, m = cell
    begins = rows(load(resets_refs[0].at[b, t], BY_ROW), width) > 0
    return (c, n, jnp.where(begins, -jnp.inf, m)), None if h is None else jnp.where(begins, 0.0, h)


def _sigmoid(x):
    return 1.0 / (1.0 + jnp.exp(-x))


def _gates(gates):
    """[B/8, H, T, 4, P, 8] of i, f, z and o. Padding keeps a cell as it is: its i is -inf and its f is inf."""
    padding = (-jnp.inf, jnp.inf, 0.0, 0.0)
    padded = (
        jnp.pad(gate, ((0, 0), (0, -gate.shape[1] % CHUNK), (0, 0), (0, 0)), constant_values=value)
        for gate, value in zip(gates, padding, strict=True)
    )
    return jnp.stack([_tiles(gate) for gate in padded], 3)


def _tiles(v):
    """[B, T, H, P] as [B/8, H, T, P, 8], float32."""
    v = pad(v.astype(jnp.float32), 0, ROWS, 3, CELLS)
    return jnp.transpose(v.reshape(-1, ROWS, *v.shape[1:]), (0, 3, 2, 4, 1))


def _untile(v, B, P):
    """Back to [B, T, H, P]."""
    v = jnp.transpose(v, (0, 4, 2, 1, 3))
    return v.reshape(-1, *v.shape[2:])[:B, ..., :P]


def _row_resets(resets):
    """[B/8, T, 8], 1.0 where a document begins."""
    if resets is None:
        return None
    resets = pad(resets.astype(jnp.float32), 0, ROWS, 1, CHUNK)
    return jnp.swapaxes(resets.reshape(-1, ROWS, resets.shape[1]), 1, 2)


def _connections(R):
    return pad(R.astype(jnp.float32), 2, CELLS, 3, CELLS)
