"""GGML's block formats: the bytes and numbers of the `gguf` package, and for the K formats the bytes of ggml itself."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from phyla.kernels.quantized_matmul import Ggml, quantize_ggml, quantized_matmul
from phyla.kernels.quantized_matmul.ggml import KINDS, fitting

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parents[1] / "goldens" / "ggml" / "blocks.safetensors"
K_FORMATS = ("q2_k", "q4_k", "q6_k")


def of_gguf(kind):
    return gguf.GGMLQuantizationType[kind.upper()]


@functools.cache
def golden():
    """Rows of outputs, of many sizes; the first are zero, constant, half zero, of one sign, with a tiny part."""
    found = load_file(GOLDEN)
    return found.pop("x").astype(np.float32), found


@functools.cache
def rounded(kind) -> Ggml:
    return jax.jit(functools.partial(quantize_ggml, kind=kind))(golden()[0].T)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_gguf(kind):
    """As it writes them, and of those that it can only read the numbers; the sizes are as it has them."""
    x, _ = golden()
    w = rounded(kind)
    assert w.shape == x.shape[::-1]
    assert gguf.GGML_QUANT_SIZES[of_gguf(kind)] == KINDS[kind][:2]
    assert w.bits_per_weight == 8 * KINDS[kind].size / KINDS[kind].rows
    if kind not in K_FORMATS:
        np.testing.assert_array_equal(w.blocks, gguf.quantize(x, of_gguf(kind)))
    dense = np.asarray(jax.jit(Ggml.materialize)(w)).T
    np.testing.assert_array_equal(dense, gguf.dequantize(np.asarray(w.blocks), of_gguf(kind)))
    columns = np.array([23, 0, 7, 7])
    found = jax.jit(Ggml.take_columns)(w, columns)
    np.testing.assert_array_equal(found, dense.T[:, columns])


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_read_as_gguf_reads_them(kind):
    """Codes and scales that rounding never makes, too."""
    rows, size, *_ = KINDS[kind]
    data = np.random.default_rng(1).integers(0, 256, (3, 512 // rows, size), dtype=np.uint8)
    halves = {"q2_k": (80, 82), "q4_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2)}.get(kind, (0,))
    for at in halves:  # finite
        data[..., at + 1] &= 0xBF
    data = data.reshape(3, -1)
    found = jax.jit(Ggml.materialize)(Ggml(blocks=jnp.asarray(data), kind=kind))
    np.testing.assert_array_equal(np.asarray(found).T, gguf.dequantize(data, of_gguf(kind)))


@pytest.mark.parametrize("kind", K_FORMATS)
def test_k_formats_are_searched_as_in_ggml(kind):
    """Nearly all blocks have its bytes; in the others sums in another order chose a scale as good."""
    x, expected = golden()
    found, expected = (np.asarray(a).reshape(-1, KINDS[kind].size) for a in (rounded(kind).blocks, expected[kind]))
    same = (found == expected).all(1)
    assert same.mean() > 0.9
    assert same[:8].all()
    error, of_ggml = (
        np.square(gguf.dequantize(a.reshape(len(x), -1), of_gguf(kind)) - x).sum() for a in (found, expected)
    )
    assert error == pytest.approx(of_ggml, rel=1e-3)


def test_the_search_is_worth_it():
    """Fewer errors than simpler formats of as many bits or more; more bits, fewer errors."""
    x = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    error = {}
    for kind in KINDS:
        w = jax.jit(functools.partial(quantize_ggml, kind=kind))(x.T)
        error[kind] = float(np.sqrt(np.mean((np.asarray(w.materialize()).T - x) ** 2)))
    assert error["q4_k"] < 0.9 * error["q4_0"]
    assert error["q4_k"] < 0.95 * error["q4_1"]
    order = ("q8_0", "q6_k", "q5_0", "q4_k", "q4_1", "q4_0", "q2_k")
    assert [error[kind] for kind in order] == sorted(error.values())


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient(kind):
    """Several blocks of rows, and a rest where blocks are small."""
    w = rounded(kind)
    if KINDS[kind].rows == 32:
        w = Ggml(blocks=w.blocks[:, : 15 * KINDS[kind].size], kind=kind)
    K, N = w.shape
    dense = gguf.dequantize(np.asarray(w.blocks), of_gguf(kind)).T.astype(np.float64)
    rng = np.random.default_rng(2)
    x, g = (rng.standard_normal((5, size)).astype(np.float32) for size in (K, N))

    @jax.jit
    def both(x, w, g):
        y, pullback = jax.vjp(lambda x: quantized_matmul(x, w), x)
        return y, *pullback(g)

    for found, expected in zip(both(x, w, g), (x @ dense, g @ dense.T), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_rows_that_are_no_whole_blocks():
    assert {kind: fitting(kind, 32) for kind in K_FORMATS} == {"q2_k": "q4_0", "q4_k": "q5_0", "q6_k": "q8_0"}
    assert fitting("q4_k", 512) == "q4_k"
    assert not any(fitting(kind, 48) for kind in KINDS)
    with pytest.raises(ValueError, match=r"32 rows are no whole blocks of 256 \(q4_k\)"):
        quantize_ggml(jnp.zeros((32, 4)), kind="q4_k")
