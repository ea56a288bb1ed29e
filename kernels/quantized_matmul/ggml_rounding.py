"""Rounding to GGML's block formats.

The simple ones are those of the `gguf` package to the bit: every operation is rounded to float32 as NumPy does it. The
K formats search scales as ggml's reference does without an importance matrix (Kawrakow, llama.cpp PR 1684): from a few
trial scales the codes, from these by weighted least squares the scale and minimum; what errs least is kept. Sums go in
another order than in C, so that now and then a scale is the one next to it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from phyla.kernels.quantized_matmul.ggml import KINDS, Ggml, half

once = jax.lax.optimization_barrier
"""A product rounded before it is added to: XLA's CPU compiler would contract both."""

TINY = 1e-15
"""Below which ggml takes a block as zero."""


def quantize_ggml(w: jax.Array, *, kind: str) -> Ggml:
    """Round w [K, N] to blocks of a kind of `ggml.KINDS`.

    Raises:
        ValueError: K is not divisible by the rows of a block.
    """
    K, N = w.shape
    of_block = KINDS[kind].rows
    if K % of_block:
        raise ValueError(f"quantize_ggml: {K} rows are no whole blocks of {of_block} ({kind})")
    x_NxBxR = w.astype(jnp.float32).T.reshape(N, K // of_block, of_block)
    return Ggml(blocks=WRITE[kind](x_NxBxR).reshape(N, -1), kind=kind)


def _quotient(x: jax.Array, n: float) -> jax.Array:
    """x / n; by a constant XLA would multiply with its reciprocal."""
    return x / jnp.where(x == x, n, jnp.nan)


def _inverse(d: jax.Array) -> jax.Array:
    return jnp.where(d == 0, 0.0, 1 / jnp.where(d == 0, 1.0, d))


def _bytes(d: jax.Array) -> jax.Array:
    """Float32 [..., 1] as float16, uint8 [..., 2]."""
    return jax.lax.bitcast_convert_type(d[..., 0].astype(jnp.float16), jnp.uint8)


def _joined(codes: jax.Array, bits: int) -> jax.Array:
    """Inverse of `ggml.bits_of`: [..., 8 / bits, B] to uint8 [..., B]."""
    parts = [codes[..., i, :].astype(jnp.uint8) << i * bits for i in range(8 // bits)]
    return functools.reduce(jnp.bitwise_or, parts)


def _largest(x: jax.Array) -> jax.Array:
    """The one of the largest magnitude, with its sign: [..., 1]."""
    return jnp.take_along_axis(x, jnp.abs(x).argmax(-1, keepdims=True), -1)


def _truncated(x: jax.Array, most: int) -> jax.Array:
    return jnp.clip(jnp.floor(x), 0, most).astype(jnp.uint8)


def _q8_0(x: jax.Array) -> jax.Array:
    d = _quotient(jnp.abs(x).max(-1, keepdims=True), 127.0)
    magnitude = jnp.abs(x * _inverse(d))
    whole = jnp.floor(magnitude)
    codes = jnp.sign(x) * (whole + jnp.floor(2 * (magnitude - whole)))  # halves away from zero
    return jnp.concatenate([_bytes(d), jax.lax.bitcast_convert_type(codes.astype(jnp.int8), jnp.uint8)], -1)


def _q4_0(x: jax.Array) -> jax.Array:
    d = _largest(x) / -8
    codes = _truncated(once(x * _inverse(d)) + 8.5, 15)
    return jnp.concatenate([_bytes(d), _joined(codes.reshape(*x.shape[:2], 2, 16), 4)], -1)


def _q4_1(x: jax.Array) -> jax.Array:
    low = x.min(-1, keepdims=True)
    d = _quotient(x.max(-1, keepdims=True) - low, 15.0)
    codes = _truncated(once((x - low) * _inverse(d)) + 0.5, 15)
    return jnp.concatenate([_bytes(d), _bytes(low), _joined(codes.reshape(*x.shape[:2], 2, 16), 4)], -1)


def _q5_0(x: jax.Array) -> jax.Array:
    d = _largest(x) / -16
    codes = _truncated(once(x * _inverse(d)) + 16.5, 31)
    high = _joined(jnp.swapaxes((codes >> 4).reshape(*x.shape[:2], 4, 8), -1, -2), 1)
    return jnp.concatenate([_bytes(d), high, _joined((codes & 15).reshape(*x.shape[:2], 2, 16), 4)], -1)


def _q2_k(x: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[:2], 16, 16)
    scale, minimum, codes = _affine(x, jnp.abs(x), most=3, first=-0.5, count=16, norm=jnp.abs)
    d, scale = _in_steps(scale, 15)
    m, minimum = _in_steps(minimum, 15)
    codes = _again(x, codes, half(_bytes(d)) * scale, half(_bytes(m)) * minimum, 0, 3)
    packed = _joined(codes.reshape(*x.shape[:2], 2, 4, 32), 2).reshape(*x.shape[:2], 64)
    both = scale.astype(jnp.uint8) | minimum.astype(jnp.uint8) << 4
    return jnp.concatenate([both, packed, _bytes(d), _bytes(m)], -1)


def _q4_k(x: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[:2], 8, 32)
    weights = jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True)) + jnp.abs(x)
    scale, minimum, codes = _affine(x, weights, most=15, first=-1.0, count=21, norm=jnp.square)
    d, scale = _in_steps(scale, 63)
    m, minimum = _in_steps(minimum, 63)
    codes = _again(x, codes, half(_bytes(d)) * scale, half(_bytes(m)) * minimum, 0, 15)
    packed = _joined(codes.reshape(*x.shape[:2], 4, 2, 32), 4).reshape(*x.shape[:2], 128)
    s, t = scale.astype(jnp.uint8), minimum.astype(jnp.uint8)
    first = [each[..., :4] | each[..., 4:] >> 4 << 6 for each in (s, t)]
    return jnp.concatenate([_bytes(d), _bytes(m), *first, s[..., 4:] & 15 | t[..., 4:] << 4, packed], -1)


def _q6_k(x: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[:2], 16, 16)
    scale, codes = _linear(x, 32)
    largest = _largest(scale)
    zero = jnp.abs(largest) < TINY
    inverse = jnp.where(zero, 0.0, -128 / jnp.where(zero, 1.0, largest))
    d = _inverse(inverse)
    scale = jnp.minimum(jnp.round(inverse * scale), 127)
    codes = _again(x, codes, half(_bytes(d)) * scale, jnp.zeros_like(scale), -32, 31) + 32
    codes = jnp.where(zero[..., None], 0, codes).astype(jnp.uint8).reshape(*x.shape[:2], 2, 128)
    low = _joined((codes & 15).reshape(*x.shape[:2], 2, 2, 64), 4).reshape(*x.shape[:2], 128)
    high = _joined((codes >> 4).reshape(*x.shape[:2], 2, 4, 32), 2).reshape(*x.shape[:2], 64)
    scales = jax.lax.bitcast_convert_type(scale.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([low, high, scales, _bytes(d)], -1)


WRITE = {"q8_0": _q8_0, "q5_0": _q5_0, "q4_0": _q4_0, "q4_1": _q4_1, "q6_k": _q6_k, "q4_k": _q4_k, "q2_k": _q2_k}


def _in_steps(scale: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The scales of a block [..., S], not negative, in steps of 1 / most of the largest: the step [..., 1], codes."""
    largest = scale.max(-1, keepdims=True)
    return _quotient(jnp.abs(largest), most), jnp.minimum(jnp.round(most * _inverse(largest) * scale), most)


def _again(x: jax.Array, codes: jax.Array, scale: jax.Array, minimum: jax.Array, least: int, most: int) -> jax.Array:
    """Codes for the scales and minima [..., S] as they are stored; those before where a scale became zero."""
    zero = (scale == 0)[..., None]
    found = jnp.round((x + minimum[..., None]) / jnp.where(zero, 1.0, scale[..., None]))
    return jnp.where(zero, codes, jnp.clip(found, least, most))


def _affine(
    x: jax.Array, weights: jax.Array, *, most: int, first: float, count: int, norm: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., n] ≈ scale · code - minimum, with codes 0 … most and neither negative.

    Trial scales bring the range, which begins at the best minimum so far, to most, then most + first + 0.1 i,
    i = 0 … count - 1. Returns scale and minimum [...], and codes [..., n].
    """
    total = lambda a: jnp.sum(weights * a, -1, keepdims=True)  # noqa: E731
    low, high = jnp.minimum(x.min(-1, keepdims=True), 0), x.max(-1, keepdims=True)
    sum_w, sum_x = total(jnp.ones_like(x)), total(x)

    def trial(steps: jax.Array | float, low: jax.Array) -> jax.Array:
        span = high - low
        return jnp.clip(jnp.round(steps / jnp.where(span == 0, jnp.inf, span) * (x - low)), 0, most)

    def better(i: jax.Array, best: tuple) -> tuple:
        codes = trial(0.1 * i + first + most, best[2])
        sum_l, sum_ll, sum_xl = total(codes), total(codes * codes), total(codes * x)
        determinant = sum_w * sum_ll - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) * _inverse(determinant)
        minimum = (sum_ll * sum_x - sum_l * sum_xl) * _inverse(determinant)
        scale = jnp.where(minimum > 0, sum_xl * _inverse(sum_ll), scale)
        minimum = jnp.minimum(minimum, 0)
        error = total(norm(scale * codes + minimum - x))
        found = (determinant > 0) & (error < best[0])
        return jax.tree.map(functools.partial(jnp.where, found), (error, scale, minimum, codes), best)

    codes, scale = trial(most, low), (high - low) / most
    best = total(norm(scale * codes + low - x)), scale, low, codes
    _, scale, minimum, codes = jax.lax.fori_loop(0, count, better, best)
    return scale[..., 0], -minimum[..., 0], codes


def _linear(x: jax.Array, half_range: int) -> tuple[jax.Array, jax.Array]:
    """x [..., n] ≈ scale · code with codes -half_range … half_range - 1; errors count by x².

    Trial scales bring the largest magnitude to -half_range, then to 0.9 less … 0.9 more. Returns scales [...] and
    codes [..., n].
    """
    largest = _largest(x)
    zero = jnp.abs(largest) < TINY
    inverse = _inverse(jnp.where(zero, 0.0, largest))
    total = lambda a: jnp.sum(x * x * a, -1, keepdims=True)  # noqa: E731

    def trial(steps: jax.Array | float) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes = jnp.clip(jnp.round(-steps * inverse * x), -half_range, half_range - 1)
        return total(x * codes), total(codes * codes), codes

    def better(i: jax.Array, best: tuple) -> tuple:
        sum_xl, sum_ll, codes = trial(half_range + 0.1 * (i - 9))
        found = (sum_ll > 0) & (sum_xl * sum_xl > best[0] * sum_ll)
        scale = sum_xl * _inverse(sum_ll)
        return jax.tree.map(functools.partial(jnp.where, found), (scale * sum_xl, scale, codes), best)

    sum_xl, sum_ll, codes = trial(half_range)
    scale = sum_xl * _inverse(sum_ll)
    _, scale, codes = jax.lax.fori_loop(0, 19, better, (scale * sum_xl, scale, codes))
    return scale[..., 0], jnp.where(zero, -half_range, codes)
