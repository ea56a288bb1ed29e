"""Selective scan for XLA: chunks of time, and a backward pass that recomputes the states of a chunk.

Only the inputs and the state at the start of every chunk are kept for the backward pass, so memory grows with T D
and not with T D N. Inside, arrays are (time, B, N, D): D is minor, so that every operation is a long vector.

The body of a loop runs on one thread on a CPU, and its cost there is exp, then memory traffic. Hence three exp per
token and channel in all (forward, recomputation, backward), an exp of our own, and no array of states beyond those
of one chunk. A step of a training batch shard (B 2, N 16, D 512) is 64 KB; a chunk of 16 is 1 MB.
"""

import math

import jax
import jax.numpy as jnp

CHUNK = 16


def selective_scan_xla(x, dt, A, B, C, D, initial_state, resets):
    """Scan in float32. `resets` is bool [B, T] or None."""
    if initial_state.dtype != jnp.float32:
        raise ValueError("selective_scan: 'xla' computes in float32, but x is float64; cast it or use 'reference'")
    if x.shape[1] == 1:
        return _decode(x, dt, A, B, C, D, initial_state)
    return _scan(x, dt, A, B, C, D, initial_state, resets)


def _decode(x, dt, A, B, C, D, h_BxDxN):
    """One token, in the layout of the caller's state."""
    x_BxD, dt_BxD, B_BxN, C_BxN = (v[:, 0].astype(jnp.float32) for v in (x, dt, B, C))
    decay_BxDxN = jnp.exp(dt_BxD[:, :, None] * A.astype(jnp.float32))
    h_BxDxN = decay_BxDxN * h_BxDxN + (dt_BxD * x_BxD)[:, :, None] * B_BxN[:, None, :]
    y_BxD = jnp.einsum("bdn,bn->bd", h_BxDxN, C_BxN) + D.astype(jnp.float32) * x_BxD
    return y_BxD[:, None].astype(x.dtype), h_BxDxN


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, initial_state, resets) -> tuple[jax.Array, jax.Array]:
    return _forward(x, dt, A, B, C, D, initial_state, resets)[0]


def _forward(x, dt, A, B, C, D, initial_state, resets):
    rate_NxD = _rate(A)

    def step(h_BxNxD, inputs):
        dt_BxD, u_BxD, B_BxN, C_BxN, reset_B = inputs
        h_BxNxD = _advance(_reset(h_BxNxD, reset_B), dt_BxD, u_BxD, B_BxN, rate_NxD)
        return h_BxNxD, jnp.einsum("bnd,bn->bd", h_BxNxD, C_BxN)

    def chunk(h_BxNxD, inputs):
        end_BxNxD, y_LxBxD = jax.lax.scan(step, h_BxNxD, inputs)
        return end_BxNxD, (y_LxBxD, h_BxNxD)

    inputs = (_chunks(dt), _chunks(_input(x, dt)), _chunks(B), _chunks(C), _chunks(resets))
    h_BxNxD, (y_KxLxBxD, h_KxBxNxD) = jax.lax.scan(chunk, jnp.swapaxes(initial_state, 1, 2), inputs)
    y = _join(y_KxLxBxD, x) + D.astype(jnp.float32) * x
    return (y.astype(x.dtype), jnp.swapaxes(h_BxNxD, 1, 2)), (x, dt, A, B, C, D, resets, h_KxBxNxD)


def _backward(saved, cotangents):
    x, dt, A, B, C, D, resets, h_KxBxNxD = saved
    dy, dh_BxDxN = cotangents
    rate_NxD, A_NxD = _rate(A), A.astype(jnp.float32).T

    def recompute(h_BxNxD, inputs):
        dt_BxD, u_BxD, B_BxN, _, dy_BxD, reset_B = inputs
        h_BxNxD = _reset(h_BxNxD, reset_B)
        next_BxNxD = _advance(h_BxNxD, dt_BxD, u_BxD, B_BxN, rate_NxD)
        return next_BxNxD, (h_BxNxD, jnp.einsum("bnd,bd->bn", next_BxNxD, dy_BxD))

    def step(carry, inputs):
        g_BxNxD, dA_BxNxD = carry
        dt_BxD, u_BxD, B_BxN, C_BxN, dy_BxD, reset_B, h_BxNxD = inputs  # h: before this token
        g_BxNxD += C_BxN[:, :, None] * dy_BxD[:, None, :]
        du_BxD = jnp.einsum("bnd,bn->bd", g_BxNxD, B_BxN)
        dB_BxN = jnp.einsum("bnd,bd->bn", g_BxNxD, u_BxD)
        g_BxNxD = _reset(g_BxNxD * _exp2(dt_BxD[:, None, :] * rate_NxD), reset_B)
        d_exponent_BxNxD = g_BxNxD * h_BxNxD
        dA_BxNxD += d_exponent_BxNxD * dt_BxD[:, None, :]
        return (g_BxNxD, dA_BxNxD), (du_BxD, _sum_states(d_exponent_BxNxD * A_NxD), dB_BxN)

    def chunk(carry, inputs):
        *tokens, h_BxNxD = inputs
        _, (h_LxBxNxD, dC_LxBxN) = jax.lax.scan(recompute, h_BxNxD, tokens)
        carry, (du, ddt, dB) = jax.lax.scan(step, carry, (*tokens, h_LxBxNxD), reverse=True)
        return carry, (du, ddt, dB, dC_LxBxN)

    g_BxNxD = jnp.swapaxes(dh_BxDxN, 1, 2)
    inputs = (*map(_chunks, (dt, _input(x, dt), B, C, dy, resets)), h_KxBxNxD)
    (g_BxNxD, dA_BxNxD), by_chunk = jax.lax.scan(chunk, (g_BxNxD, jnp.zeros_like(g_BxNxD)), inputs, reverse=True)
    du, ddt, dB, dC = (_join(v, x) for v in by_chunk)
    gradients = (
        du * dt + D.astype(jnp.float32) * dy,
        du * x + ddt,
        dA_BxNxD.sum(0).T,
        dB,
        dC,
        jnp.sum(dy.astype(jnp.float32) * x, (0, 1)),
    )
    dtypes = (v.dtype for v in (x, dt, A, B, C, D))
    return *(v.astype(dtype) for v, dtype in zip(gradients, dtypes, strict=True)), jnp.swapaxes(g_BxNxD, 1, 2), None


_scan.defvjp(_forward, _backward)


def _advance(h_BxNxD, dt_BxD, u_BxD, B_BxN, rate_NxD):
    return _exp2(dt_BxD[:, None, :] * rate_NxD) * h_BxNxD + u_BxD[:, None, :] * B_BxN[:, :, None]


def _reset(h_BxNxD, reset_B):
    return h_BxNxD if reset_B is None else jnp.where(reset_B[:, None, None], 0, h_BxNxD)


def _input(x, dt):
    return x.astype(jnp.float32) * dt


def _rate(A_DxN):
    """A such that exp(dt A) = 2^(dt rate), with D minor."""
    return A_DxN.astype(jnp.float32).T * math.log2(math.e)


def _chunks(v):
    """[B, T, ...] to [K, L, B, ...] in float32, padded with zeros: dt = 0 leaves the state as it is."""
    if v is None:
        return None
    length = min(CHUNK, v.shape[1])
    v = jnp.moveaxis(v if v.dtype == bool else v.astype(jnp.float32), 1, 0)
    v = jnp.pad(v, ((0, -len(v) % length), *((0, 0),) * (v.ndim - 1)))
    return v.reshape(-1, length, *v.shape[1:])


def _join(v, x):
    """[K, L, B, ...] to [B, T, ...] with the T of x."""
    return jnp.moveaxis(v.reshape(-1, *v.shape[2:])[: x.shape[1]], 0, 1)


def _sum_states(v_BxNxD):
    """Sum over N, by halves: XLA:CPU vectorises additions of slices but not a reduction fused with its input."""
    while (n := v_BxNxD.shape[1]) > 1:
        half = v_BxNxD[:, : n // 2] + v_BxNxD[:, n // 2 : n // 2 * 2]
        v_BxNxD = half if n % 2 == 0 else jnp.concatenate([half, v_BxNxD[:, -1:]], 1)
    return v_BxNxD[:, 0]


# 2^f on [-1/2, 1/2] by its minimax polynomial of degree 6 (relative error 2e-9), lowest power first.
_POWERS = (1.0, 0.69314718, 0.24022648, 0.055503324, 0.009618437, 0.0013398875, 0.0001535336)


@jax.custom_jvp
def _exp2(z):
    """2^z for z <= 0 (0 < 2^z <= 1), to float32 precision; below 2^-126 it stays there."""
    return jax.lax.platform_dependent(z, cpu=_exp2_cpu, default=jnp.exp2)


@_exp2.defjvp
def _exp2_jvp(primals, tangents):
    y = _exp2(*primals)
    return y, tangents[0] * y * math.log(2)


def _exp2_cpu(z):
    """Half the instructions of XLA:CPU's exp, which handles a wider range."""
    z = jnp.maximum(z, -126.0)
    rounder = jnp.float32(1.5 * 2**23)  # adding it leaves the nearest integer of z in the low bits of the mantissa
    shifted = z + rounder
    f = z - (shifted - rounder)
    power = jnp.full_like(f, _POWERS[-1])
    for coefficient in _POWERS[-2::-1]:
        power = power * f + coefficient
    exponent = jax.lax.bitcast_convert_type(shifted, jnp.int32) << 23
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(power, jnp.int32) + exponent, jnp.float32)
