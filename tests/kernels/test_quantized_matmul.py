"""Quantized matmul against numpy in float64, in every implementation and format; NF4 against bitsandbytes' scheme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import quantized_matmul as ops
from phyla.kernels.quantized_matmul import quantized_matmul, tpu
from phyla.kernels.quantized_matmul.nf4 import CODE_BOOK

IMPLEMENTATIONS = ("reference", "xla", "tpu")
COLUMNS = np.array([3, 40, 1000], np.int32)  # the last is padding
QUANTIZE = {
    "int8": ops.quantize_int8,
    "dynamic int8": functools.partial(ops.quantize_int8, dynamic=True),
    "float8": ops.quantize_float8,
    "dynamic float8": functools.partial(ops.quantize_float8, dynamic=True),
    "int4": functools.partial(ops.quantize_int4, group=64),
    "int4 with zeros": functools.partial(ops.quantize_int4, group=32, symmetric=False),
    "int4 of one group": functools.partial(ops.quantize_int4, group=1024),
    "nf4": ops.quantize_nf4,
    "LLM.int8": lambda w: ops.quantize_llm_int8(w, jnp.asarray(COLUMNS)),
    "nf4 with outliers": lambda w: ops.quantize_outliers(w, jnp.asarray(COLUMNS), ops.quantize_nf4),
}
SIZES = {"one block": (64, 128), "an odd one": (37, 9), "several and a rest": (600, 5)}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def matrix(K, N, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((K, N)), jnp.float32)


def inputs(M, K, N, dtype):
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((M, K), (M, N)))
    return x.at[:, 3].multiply(30), g  # a column of outliers


def dense(w):
    """The matrix in float64, from the leaves, one element's formula at a time."""
    if isinstance(w, ops.Outliers):
        found = dense(w.body)
        for column, values in zip(np.asarray(w.columns), np.asarray(w.values, np.float64), strict=True):
            if column < len(found):
                found[column] = values
        return found
    if isinstance(w, ops.Int8 | ops.Float8):
        return np.asarray(w.codes, np.float64) * np.asarray(w.scale, np.float64)
    codes, (K, N) = np.asarray(w.codes), w.shape
    number = np.zeros((K, N), int)
    number[0::2], number[1::2] = codes[: (K + 1) // 2] & 15, (codes >> 4)[: K // 2]
    group = np.arange(K) // w.group
    if isinstance(w, ops.NF4):
        order = np.arange(N) * len(w.scale_codes) + np.arange(len(w.scale_codes))[:, None]  # by column, then down it
        scale = DYNAMIC_MAP[np.asarray(w.scale_codes)] * np.asarray(w.scale_scales, np.float64)[order // 256]
        return CODE_BOOK.astype(np.float64)[number] * (scale + float(w.scale_mean))[group]
    number = np.where(number > 7, number - 16, number)
    zero = 0 if w.zero is None else np.asarray(w.zero, int)[group]
    return (number - zero) * np.asarray(w.scale, np.float64)[group]


def dynamic_map():
    """bitsandbytes' signed map of 8 bits with 7 of exponent."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *-middles]
    return np.sort(values)


DYNAMIC_MAP = dynamic_map()


def expected(x, w, g):
    """y and dx in float64; a dynamic format rounds x by row, without the outliers' columns."""
    x, g, W = np.asarray(x, np.float64), np.asarray(g, np.float64), dense(w)
    body, outer = w, np.zeros(len(W), bool)
    if isinstance(w, ops.Outliers):
        body, outer = w.body, np.isin(np.arange(len(W)), COLUMNS)
    inner = np.where(outer, 0, x)
    if getattr(body, "dynamic", False):
        most = 127 if isinstance(body, ops.Int8) else 448
        scale = np.abs(inner).max(1, keepdims=True) / most
        codes = inner / scale
        inner = scale * (np.round(codes) if most == 127 else codes.astype(np.float32).astype(jnp.float8_e4m3fn))
    return inner @ W + np.where(outer, x, 0) @ W, g @ W.T


def close(found, exact, dtype):
    for a, b in zip(found, exact, strict=True):
        scale = np.sqrt(np.mean(b**2))
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, b / scale, atol=TOLERANCE[dtype], rtol=8e-3 * (dtype == "bfloat16")
        )


def both(call, x, g):
    """y and the gradient for x."""

    @jax.jit
    def run(x, g):
        y, pullback = jax.vjp(call, x)
        return y, *pullback(g)

    return run(x, g)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("quantize", QUANTIZE.values(), ids=QUANTIZE)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_product_and_gradient(implementation, quantize, size):
    K, N = size
    w = quantize(matrix(K, N))
    for M, dtype in ((1, "float32"), (3, "bfloat16"), (33, "float32")):
        x, g = inputs(M, K, N, dtype)
        found = both(lambda x: quantized_matmul(x, w, implementation=implementation), x, g)
        assert all(a.dtype == dtype for a in found)
        close(found, expected(x, w, g), dtype)


@pytest.mark.parametrize("quantize", QUANTIZE.values(), ids=QUANTIZE)
def test_tpu_kernels(quantize):
    """Few rows and many, over several blocks in every dimension, the last of the columns incomplete."""
    K, N = 256, 200
    w = quantize(matrix(K, N))
    block = tpu.Block(16, 128, 128)
    for M, dtype in ((3, "float32"), (40, "bfloat16")):
        x, g = inputs(M, K, N, dtype)
        found = jax.jit(lambda x, g: (tpu.product(x, w, block=block), tpu.transposed(g, w, block=block)))(x, g)
        close(found, expected(x, w, g), dtype)
