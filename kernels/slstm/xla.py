"""sLSTM for XLA: one small product a token, and a backward pass that recomputes what a chunk of time needs.

Only what does not depend on the states is parallel in time. The backward pass has the output of every token (its
own result, so that little else is kept: the state at the start of every chunk), hence it recomputes the gates of a
whole chunk with one product, and the gradient of R is one product after the sweep. Inside, arrays are
(time, H, B, P), or 4 P for the four gates side by side.

Every h is a function of C = c exp(m) and N = n exp(m): the stabiliser m is a choice of units, and the sweep treats it
as a constant. Its value matters in the final state alone, whose m is i of one token plus log σ(f) of those after it.
"""

import math

import jax
import jax.numpy as jnp

CHUNK = 8
"""Tokens of which the backward pass keeps what it computes again in a CPU's cache."""


def slstm_xla(i, f, z, o, R, bias, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None."""
    if initial_state[0].dtype != jnp.float32:
        raise ValueError("slstm: 'xla' computes in float32, but i is float64; cast it or use 'reference'")
    if i.shape[1] == 1:
        return _decode((i, f, z, o), R, bias, initial_state)
    return _scan((i, f, z, o), R, bias, initial_state, resets)


def _decode(gates, R, bias, state):
    """One token, in the layout of the caller's state."""
    c, n, h, m = state
    h_GxHxBxP = jnp.broadcast_to(jnp.swapaxes(h, 0, 1), (4, *h.shape[1::-1], h.shape[2]))  # leaves R where it lies
    recurrent_GxHxBxP = jnp.einsum("ghbp,ghpq->ghbq", h_GxHxBxP, R.astype(jnp.float32))
    i, f, z, o = (
        gate[:, 0].astype(jnp.float32) + jnp.swapaxes(recurrent, 0, 1) + b
        for gate, recurrent, b in zip(gates, recurrent_GxHxBxP, bias.astype(jnp.float32), strict=True)
    )
    (c, n, m), _ = advance((c, n, stabiliser(n, m)), i, log_sigmoid(f), jnp.tanh(z))
    h = jax.nn.sigmoid(o) * c / n
    return h[:, None].astype(gates[0].dtype), (c, n, h, m)


@jax.custom_vjp
def _scan(gates, R, bias, initial_state, resets) -> tuple[jax.Array, tuple]:
    return _forward(gates, R, bias, initial_state, resets)[0]


def _forward(gates, R, bias, initial_state, resets):
    R_HxPxF = _side_by_side(R)

    def step(carry, inputs):
        cell, h_HxBxP = carry
        gates, reset_Bx1 = inputs
        h_HxBxP = _where_reset(reset_Bx1, 0, h_HxBxP)
        i, f, z, o = _add(gates, h_HxBxP @ R_HxPxF)
        cell, _ = advance(_begin(cell, reset_Bx1), i, log_sigmoid(f), jnp.tanh(z))
        h_HxBxP = jax.nn.sigmoid(o) * cell[0] / cell[1]
        return (cell, h_HxBxP), h_HxBxP

    inputs = _gate_chunks(gates, bias), _chunks(_by_time(resets))
    count, length = _lengths(gates[0].shape[1])

    def chunk(carry, k):
        def token(carry, t):  # read where it lies: chunks as inputs of the scan would be copied
            return step(carry, jax.tree.map(lambda x: x[k, t], inputs))

        after, h_LxHxBxP = jax.lax.scan(token, carry, jnp.arange(length))
        return after, (h_LxHxBxP, carry[0])

    c, n, h, m = _heads_first(initial_state)
    start = (c, n, stabiliser(n, m)), h
    ((c, n, m), _), (h_KxLxHxBxP, cells) = jax.lax.scan(chunk, start, jnp.arange(count))
    h_TxHxBxP = _tokens(h_KxLxHxBxP, gates[0])
    final_state = tuple(_heads_first((c, n, h_TxHxBxP[-1], m)))
    return (_batch_first(h_TxHxBxP, gates[0]), final_state), (
        gates,
        R,
        bias,
        initial_state,
        resets,
        h_TxHxBxP,
        cells,
        (c, n),
    )


def _backward(saved, cotangents):
    gates, R, bias, initial_state, resets, h_TxHxBxP, cells, (c_end, n_end) = saved
    dy, d_final_state = cotangents
    R_HxPxF = _side_by_side(R)
    R_HxFxP = jnp.swapaxes(R_HxPxF, 1, 2)
    c, n, h, _ = _heads_first(initial_state)
    dc, dn, dh, dm = _heads_first(d_final_state)
    dm -= dc * c_end + dn * n_end  # at constant C and N
    resets_TxBx1 = _by_time(resets)
    before_TxHxBxP = jnp.concatenate([h[None], h_TxHxBxP[:-1]])
    if resets_TxBx1 is not None:
        before_TxHxBxP = jnp.where(resets_TxBx1[:, None], 0, before_TxHxBxP)
    dy_TxHxBxP = _time_first(dy).at[-1].add(dh)

    def recompute(cell, inputs):
        *inputs, reset_Bx1 = inputs
        c, n, _ = cell
        cell, (keep, write) = advance(_begin(cell, reset_Bx1), *inputs)
        return cell, (c, n, *cell[:2], keep, write)

    def step(carry, inputs):
        dc, dn, dm, dh = carry
        (c_before, n_before, c, n, keep, write), f, tanh_z, sigmoid_o, dy, reset_Bx1 = inputs
        dh += dy
        do = dh * (c / n) * sigmoid_o * (1 - sigmoid_o)
        dc_here = dh * sigmoid_o / n
        dc += dc_here
        dn -= dc_here * (c / n)
        dz = dc * write * (1 - tanh_z * tanh_z)
        began = write == 1  # m is this token's i
        di = write * (dc * tanh_z + dn) + jnp.where(began, dm, 0)
        dm = jnp.where(began, 0, dm)
        df = (keep * (dc * c_before + dn * n_before) + dm) * jax.nn.sigmoid(-f)
        dh = _where_reset(reset_Bx1, 0, jnp.concatenate([di, df, dz, do], axis=-1) @ R_HxFxP)
        return (dc * keep, dn * keep, dm, dh), (di, df, dz, do)

    def chunk(carry, inputs):
        gates, before_LxHxBxP, dy_LxHxBxP, resets_LxBx1, cell = inputs
        i, f, z, o = _add(gates, jnp.einsum("lhbp,hpf->lhbf", before_LxHxBxP, R_HxPxF))
        tanh_z = jnp.tanh(z)
        _, cells = jax.lax.scan(recompute, cell, (i, log_sigmoid(f), tanh_z, resets_LxBx1))
        inputs = cells, f, tanh_z, jax.nn.sigmoid(o), dy_LxHxBxP, resets_LxBx1
        return jax.lax.scan(step, carry, inputs, reverse=True)

    inputs = _gate_chunks(gates, bias), *map(_chunks, (before_TxHxBxP, dy_TxHxBxP, resets_TxBx1)), cells
    (dc, dn, dm, dh), d_gates = jax.lax.scan(chunk, (dc, dn, dm, jnp.zeros_like(dh)), inputs, reverse=True)
    dm += dc * c + dn * n
    d_gates = [_tokens(d, dy) for d in d_gates]
    dR = jnp.stack([jnp.einsum("thbp,thbq->hpq", before_TxHxBxP, d) for d in d_gates])
    d_bias = jnp.stack([d.sum((0, 2)) for d in d_gates])
    return (
        tuple(_batch_first(d, gate) for d, gate in zip(d_gates, gates, strict=True)),
        dR.astype(R.dtype),
        d_bias.astype(bias.dtype),
        tuple(_heads_first((dc, dn, dh, dm))),
        None,
    )


_scan.defvjp(_forward, _backward)


def advance(cell, i, log_f, tanh_z):
    """The cell after one token, and what it kept and wrote: one of the two is 1."""
    c, n, m = cell
    decay = log_f + m
    smaller = jnp.exp(-jnp.abs(decay - i))
    keep, write = jnp.where(decay > i, 1, smaller), jnp.where(decay > i, smaller, 1)
    return (keep * c + write * tanh_z, keep * n + write, jnp.maximum(decay, i)), (keep, write)


def _begin(cell, reset_Bx1):
    """Where a document begins nothing is kept: m is -inf."""
    c, n, m = cell
    return c, n, _where_reset(reset_Bx1, -jnp.inf, m)


def _where_reset(reset_Bx1, value, x_HxBxP):
    return x_HxBxP if reset_Bx1 is None else jnp.where(reset_Bx1, value, x_HxBxP)


def stabiliser(n, m):
    """-inf where nothing has been seen, else m."""
    return jnp.where(n == 0, -jnp.inf, m)


def log_sigmoid(x):
    """log σ(x), without overflow: log(1 + e) = 2 artanh(e / (2 + e)), whose series to float32's precision is faster."""
    e = jnp.exp(-jnp.abs(x))
    s = e / (2 + e)
    series = 1 / 13
    for n in (11, 9, 7, 5, 3, 1):
        series = series * (s * s) + 1 / n
    return jnp.minimum(x, 0) - 2 * s * series


def _add(gates, recurrent):
    return [gate + r for gate, r in zip(gates, jnp.split(recurrent, 4, axis=-1), strict=True)]


def _side_by_side(R_GxHxPxP):
    """[4, H, P, P] to [H, P, 4 P] in float32."""
    G, H, P, _ = R_GxHxPxP.shape
    return jnp.moveaxis(R_GxHxPxP.astype(jnp.float32), 0, 2).reshape(H, P, G * P)


def _heads_first(state):
    """Each [B, H, P] to [H, B, P], or back."""
    return [jnp.swapaxes(part, 0, 1) for part in state]


def _by_time(resets_BxT):
    return None if resets_BxT is None else resets_BxT.T[:, :, None]


def _time_first(v_BxTxHxP):
    return jnp.transpose(v_BxTxHxP.astype(jnp.float32), (1, 2, 0, 3))


def _batch_first(v_TxHxBxP, like):
    return jnp.transpose(v_TxHxBxP, (2, 0, 1, 3)).astype(like.dtype)


def _gate_chunks(gates, bias):
    """Each gate with its bias, by chunks. Padding keeps a cell as it is: its i is -inf and its f is inf."""
    return [
        _chunks(_time_first(gate) + b[:, None], padding)
        for gate, b, padding in zip(gates, bias.astype(jnp.float32), (-jnp.inf, jnp.inf, 0.0, 0.0), strict=True)
    ]


def _lengths(T):
    """How many chunks, and of how many tokens."""
    count = math.ceil(T / CHUNK)
    return count, math.ceil(T / count)


def _chunks(v, padding=0.0):
    """[T, ...] to [K, L, ...]."""
    if v is None:
        return None
    count, length = _lengths(len(v))
    v = jnp.pad(v, ((0, count * length - len(v)), *((0, 0),) * (v.ndim - 1)), constant_values=padding)
    return v.reshape(count, length, *v.shape[1:])


def _tokens(v_KxLxHxBxP, like):
    """[K, L, H, B, P] to [T, H, B, P] with the T of `like`."""
    return v_KxLxHxBxP.reshape(-1, *v_KxLxHxBxP.shape[2:])[: like.shape[1]]
