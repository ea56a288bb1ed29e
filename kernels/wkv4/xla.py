"""WKV-4 for XLA: one token after another, and a backward pass that recomputes the states of a chunk of time.

Only the inputs and the state at the start of every chunk are kept for the backward pass. On a CPU the cost is exp, then
the operations in the body of a loop. Hence one exp for two weights, of which the larger is 1; and, backwards, loops
over what is recurrent alone: the exponents, then the sums, then their gradients, with everything else of a chunk at
once between them.

Both averages and sums are functions of aa exp(pp) and bb exp(pp): pp is a choice of units, a constant in the sweep. Its
value matters in the final state alone, where it is k of one token plus w for each of those after it. Inside, arrays are
[K chunks, L, B, D].
"""

import jax
import jax.numpy as jnp
import numpy as np

from phyla.kernels.wkv4.reference import EMPTY, add

CHUNK = 16


def wkv4_xla(k, v, w, u, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None."""
    aa_BxD, bb_BxD, pp_BxD = initial_state
    if aa_BxD.dtype != jnp.float32:
        raise ValueError("wkv4: 'xla' computes in float32, but v is float64; cast it or use 'reference'")
    pp_BxD = jnp.where(bb_BxD == 0, EMPTY, pp_BxD)
    k_BxTxD, v_BxTxD, w_D, u_D = (x.astype(jnp.float32) for x in (k, v, w, u))
    B, T, _ = k.shape
    if T == 1:
        y_BxD, _ = add((aa_BxD, bb_BxD, pp_BxD), u_D + k_BxTxD[:, 0], v_BxTxD[:, 0])
        _, state = add((aa_BxD, bb_BxD, pp_BxD + w_D), k_BxTxD[:, 0], v_BxTxD[:, 0])
        return y_BxD[:, None].astype(v.dtype), state
    resets = jnp.zeros((B, T), bool) if resets is None else resets
    y_BxTxD, final_state = _scan(k_BxTxD, v_BxTxD, w_D, u_D, (aa_BxD, bb_BxD, pp_BxD), resets)
    return y_BxTxD.astype(v.dtype), final_state


@jax.custom_vjp
def _scan(k, v, w, u, state, resets) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _forward(k, v, w, u, state, resets)[0]


def _forward(k, v, w, u, state, resets):
    def step(state, inputs):
        k_BxD, v_BxD, reset_B, present = inputs
        aa, bb, pp = (_reset(x, reset_B, empty) for x, empty in zip(state, (0, 0, EMPTY), strict=True))
        past, now = _weigh(pp, u + k_BxD)
        y_BxD = (past * aa + now * v_BxD) / (past * bb + now)
        decayed = pp + present * w
        kept, added = _weigh(decayed, k_BxD)
        return (kept * aa + added * v_BxD, kept * bb + added, jnp.maximum(decayed, k_BxD)), y_BxD

    inputs = _inputs(k, v, resets)
    count, length = inputs[0].shape[:2]

    def chunk(state, n):
        def token(state, t):  # read where it lies: chunks as inputs of the scan would be copied
            return step(state, [x[n, t] for x in inputs])

        after, y_LxBxD = jax.lax.scan(token, state, jnp.arange(length))
        return after, (y_LxBxD, state)

    final_state, (y, starts_KxBxD) = jax.lax.scan(chunk, state, jnp.arange(count))
    return (_join(y, k), final_state), (k, v, w, u, resets, starts_KxBxD, final_state)


def _backward(saved, cotangents):
    k, v, w, u, resets, starts_KxBxD, (aa_end, bb_end, _) = saved
    dy, (daa, dbb, dpp) = cotangents
    dpp -= daa * aa_end + dbb * bb_end  # at constant sums

    def chunk(after, inputs):
        d_sums_2xBxD, dpp_BxD = after
        (k, v, reset_LxB, present_L), dy, (aa, bb, pp) = inputs
        present_Lx1x1 = present_L[:, None, None]

        def exponent(pp, inputs):
            k_BxD, reset_B, present = inputs
            pp = _reset(pp, reset_B, EMPTY)
            return jnp.maximum(pp + present * w, k_BxD), pp

        _, pp = jax.lax.scan(exponent, pp, (k, reset_LxB, present_L))
        kept, added = _weigh(pp + present_Lx1x1 * w, k)

        def advance(sums_2xBxD, inputs):
            kept, written_2xBxD, reset_B = inputs
            sums_2xBxD = _reset(sums_2xBxD, reset_B, 0)
            return kept * sums_2xBxD + written_2xBxD, sums_2xBxD

        _, sums = jax.lax.scan(advance, jnp.stack([aa, bb]), (kept, jnp.stack([added * v, added], 1), reset_LxB))
        aa, bb = sums[:, 0], sums[:, 1]
        past, now = _weigh(pp, u + k)
        weight = past * bb + now
        y, dy = (past * aa + now * v) / weight, dy / weight

        def sweep(d_after, inputs):
            kept, read_2xBxD, reset_B = inputs
            return _reset(kept * d_after + read_2xBxD, reset_B, 0), d_after

        read = jnp.stack([past * dy, -past * dy * y], 1)
        d_sums_2xBxD, d_sums = jax.lax.scan(sweep, d_sums_2xBxD, (kept, read, reset_LxB), reverse=True)
        daa, dbb = d_sums[:, 0], d_sums[:, 1]
        time = np.arange(len(k))[:, None, None]
        winner_BxD = jnp.max(jnp.where(added == 1, time, -1), 0)  # the token whose k is pp, but for decay
        d_bonus = now * (v - y) * dy
        dk = d_bonus + added * (v * daa + dbb) + jnp.where(time == winner_BxD, dpp_BxD, 0)
        dv = now * dy + added * daa
        dw = present_Lx1x1 * (kept * (aa * daa + bb * dbb) + jnp.where(time > winner_BxD, dpp_BxD, 0))
        # Sums as products: XLA:CPU does not vectorise a reduction fused with its input, here with every exp.
        ones_L = jnp.ones(len(k), jnp.float32)
        dw, du = (jnp.tensordot(ones_L, x, 1, precision="highest") for x in (dw, d_bonus))
        return (d_sums_2xBxD, jnp.where(winner_BxD < 0, dpp_BxD, 0)), (dk, dv, dw, du)

    inputs = _inputs(k, v, resets), _chunks(dy), starts_KxBxD
    after, (dk, dv, dw, du) = jax.lax.scan(chunk, (jnp.stack([daa, dbb]), dpp), inputs, reverse=True)
    (daa, dbb), dpp = after
    aa, bb, _ = (start[0] for start in starts_KxBxD)
    d_state = daa, dbb, dpp + aa * daa + bb * dbb
    return _join(dk, k), _join(dv, k), dw.sum((0, 1)), du.sum((0, 1)), d_state, None


_scan.defvjp(_forward, _backward)


def _weigh(a, b):
    """exp(a) and exp(b) over the larger of them."""
    smaller = jnp.exp(-jnp.abs(a - b))
    return jnp.where(a > b, 1, smaller), jnp.where(a > b, smaller, 1)


def _reset(x, reset_B, empty):
    return jnp.where(reset_B[:, None], empty, x)


def _inputs(k, v, resets):
    """By chunks, and 1 for tokens, 0 for padding, of which nothing is added and at which nothing decays."""
    present_T = np.ones(k.shape[1], np.float32)
    return _chunks(k, -jnp.inf), _chunks(v), _chunks(resets), _chunks(present_T[None])[..., 0]


def _chunks(x_BxTx, padding=0.0):
    """[B, T, ...] to [K, L, B, ...]."""
    T = x_BxTx.shape[1]
    L = min(CHUNK, T)
    x_TxBx = jnp.pad(jnp.moveaxis(x_BxTx, 1, 0), ((0, -T % L), *((0, 0),) * (x_BxTx.ndim - 1)), constant_values=padding)
    return x_TxBx.reshape(-1, L, *x_TxBx.shape[1:])


def _join(x_KxLxBxD, k):
    """[K, L, B, D] to [B, T, D] with the T of k."""
    return jnp.moveaxis(x_KxLxBxD.reshape(-1, *x_KxLxBxD.shape[2:])[: k.shape[1]], 0, 1)
