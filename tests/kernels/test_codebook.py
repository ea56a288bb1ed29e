"""Codebooks and packing against numpy: products, gradients, single columns, and bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.quantized_matmul import Codebook, packing, quantized_matmul


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    """Any number of bits takes that many of a byte, and comes back; as many rows as a unit has lie together."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (37, 3))
    packed = packing.pack(jnp.asarray(codes), bits)
    whole = 37 + -37 % packing.unit(bits)
    assert packed.shape == (packing.packed_rows(37, bits), 3) == (whole * bits // 8, 3)
    np.testing.assert_array_equal(packing.unpack(packed, bits)[:37], codes)
    size = packing.unit(bits)
    some = packing.packed_rows(size, bits)
    np.testing.assert_array_equal(packing.unpack(packed[some : 2 * some], bits), codes[size : 2 * size])
    numbers = np.arange(2**bits)
    signed = packing.signed(jnp.asarray(numbers, jnp.uint8), bits)
    np.testing.assert_array_equal(signed, np.where(numbers < 2 ** (bits - 1), numbers, numbers - 2**bits))


def codebook(bits: int, K: int, N: int) -> tuple[Codebook, np.ndarray]:
    """And what it stands for."""
    rng = np.random.default_rng(bits)
    codes, book = rng.integers(0, 2**bits, (K, N)), rng.standard_normal(2**bits).astype(np.float32)
    packed = packing.pack(jnp.asarray(codes), bits)
    return Codebook(codes=packed, book=jnp.asarray(book), rows=K), book[codes]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("bits", [1, 4, 6])
def test_product_and_gradient(bits, implementation):
    """Over more rows than a block has, and a rest."""
    w, dense = codebook(bits, 600, 5)
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((3, 600)), rng.standard_normal((3, 5))

    @jax.jit
    def both(x, g):
        y, back = jax.vjp(lambda x: quantized_matmul(x, w, implementation=implementation), x)
        return y, *back(g)

    y, dx = both(jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(y, x @ dense, atol=2e-4)
    np.testing.assert_allclose(dx, g @ dense.T, atol=1e-5)
    np.testing.assert_array_equal(w.materialize(), dense)
    np.testing.assert_array_equal(w.take_columns(jnp.array([4, 0, 4])), dense[:, [4, 0, 4]])
    assert w.nbytes == packing.packed_rows(600, bits) * 5 + 4 * 2**bits


def test_a_decode_step_makes_no_dense_copy(optimised):
    w = jax.eval_shape(lambda: codebook(4, 2048, 1024)[0])
    x = jax.ShapeDtypeStruct((1, 2048), jnp.float32)
    memory = jax.jit(quantized_matmul).lower(x, w).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 2048 * 1024 / 2
