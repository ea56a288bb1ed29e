"""Huffman codes: every array comes back, lengths are the best there are, and what a pruned matrix takes on disk."""

import heapq
import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from phyla.compression import huffman
from phyla.compression.cluster import cluster
from phyla.compression.compress import abstract, compress
from phyla.compression.huffman import BLOCK, LONGEST, RUN
from phyla.compression.recipes import parse
from phyla.kernels.quantized_matmul import quantize_int4
from phyla.models.errors import UserError
from tests.compression.test_compress import built, config


def comes_back(array: np.ndarray) -> int:
    """The bytes that it takes."""
    form, data = huffman.encode(array)
    found = huffman.decode(form, data, array.dtype, array.shape)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    return len(data)


ANY = st.one_of(
    arrays.arrays(np.uint8, st.integers(0, 6000)),
    arrays.arrays(np.int8, st.tuples(st.integers(0, 9), st.integers(0, 900)), elements=st.integers(-2, 1)),
    arrays.arrays(np.uint8, st.integers(0, 6000), fill=st.just(7)),
)


@settings(deadline=None, max_examples=60)
@given(ANY)
def test_every_array_comes_back(array):
    comes_back(array)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 65_536])
def test_sizes(count):
    """At the edges of blocks: one symbol, two, all that there are, and runs as long as they get."""
    rng = np.random.default_rng(count)
    symbols = rng.integers(0, 256, count, np.uint8)
    for array in (symbols, symbols // 128, symbols * 0 + 200, np.where(symbols < 255, 0, symbols).astype(np.uint8)):
        comes_back(array)
    runs = np.zeros(count, np.uint8)
    for length in (0, 1, RUN - 2, RUN - 1, RUN, RUN + 1, 3 * RUN):
        runs[length :: length + 1] = 1
        comes_back(runs)


def test_more_blocks_than_are_encoded_at_once():
    """Of codes of all lengths; the dtype is kept."""
    geometric = np.random.default_rng(0).geometric(0.5, BLOCK * (huffman.TOGETHER + 3) + 5)
    size = comes_back(np.minimum(geometric, 120).astype(np.int8).reshape(-1, 1))
    assert 2 * len(geometric) / 8 < size < 2.02 * len(geometric) / 8  # whose entropy is 2 bits
    comes_back(np.linspace(-3, 3, 5000).astype(ml_dtypes.float8_e4m3fn))


def textbook(counts: np.ndarray) -> int:
    """Bits of all symbols together, by merging the two least until one is left."""
    heap, total = [int(count) for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@settings(deadline=None, max_examples=60)
@given(arrays.arrays(np.int64, 256, elements=st.integers(0, 50)))
def test_lengths_are_huffmans(counts):
    lengths = huffman.code_lengths(counts).astype(np.int64)
    assert ((lengths > 0) == (counts > 0)).all()
    if (counts > 0).sum() > 1:
        assert lengths.max() <= LONGEST
        assert np.sum(2.0 ** -lengths[lengths > 0]) == 1
        assert (counts * lengths).sum() == textbook(counts)


def test_lengths_are_limited():
    """Where Huffman's would be longer, they are the best that are not: against all that are possible, of a few."""
    fibonacci = np.zeros(256, np.int64)
    fibonacci[:30] = 1
    for i in range(2, 30):
        fibonacci[i] = fibonacci[i - 1] + fibonacci[i - 2]
    lengths = huffman.code_lengths(fibonacci)[:30].astype(int)
    assert lengths.max() == LONGEST
    assert np.sum(2.0**-lengths) == 1
    assert (np.diff(lengths) <= 0).all()
    few, limit = fibonacci[:6], 3
    best = min(
        int(np.dot(few, bits))
        for bits in itertools.product(range(1, limit + 1), repeat=6)
        if sum(2.0**-bit for bit in bits) <= 1
    )
    original, huffman.LONGEST = huffman.LONGEST, limit
    try:
        found = huffman.code_lengths(np.pad(few, (0, 250)))[:6]
    finally:
        huffman.LONGEST = original
    assert np.dot(few, found) == best


@pytest.mark.parametrize("how", ["kmeans-16", "int4"])
def test_ninety_percent_pruned_of_four_bits_takes_less_than_a_bit(how, tmp_path):
    """Of a matrix as large as they are: everything that the file holds, over the number of weights."""
    w = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    w[np.abs(w) < np.quantile(np.abs(w), 0.9)] = 0
    held = cluster(jnp.asarray(w), 16) if how == "kmeans-16" else quantize_int4(jnp.asarray(w), group=1024)
    codes = np.asarray(held.codes)
    sizes = huffman.write(tmp_path / "file", {"codes": codes})["codes"]
    bits = 8 * (tmp_path / "file").stat().st_size / w.size
    assert bits < 0.9
    assert 0.5 < 8 * sizes.entropy / w.size < 8 * sizes.coded / w.size < bits
    np.testing.assert_array_equal(huffman.read(tmp_path / "file")["codes"], codes)


def test_entropy():
    assert huffman.entropy(np.repeat(np.arange(4, dtype=np.uint8), 100), 8) == pytest.approx(2 * 400 / 8)
    assert huffman.entropy(np.full(100, 17, np.uint8), 8) == 0
    assert huffman.entropy(np.full(100, 0x10, np.uint8), 4) == pytest.approx(200 / 8)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "file"
    huffman.write(path, {"a.codes": np.arange(99, dtype=np.uint8), "b": np.zeros((2, 3), np.int8)})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged: b is not what was written"):
        huffman.read(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="no file of Huffman codes"):
        huffman.read(path)


def test_the_model_stays_as_it_is():
    rounded, coded = compress(built("transformer"), parse("nf4+huffman"))
    assert coded.changed
    assert set(coded.changed) == set(rounded.changed)
    for chain, error in {
        "huffman": "nothing in this model has few bits, and floats are not coded; nearest: int4\\+huffman",
        "magnitude-90%+huffman": "nothing in this model has few bits",
        "int4+huffman@mixer": "all codes of a run are written so, or none",
    }.items():
        with pytest.raises(UserError, match=error):
            abstract(config("transformer"), parse(chain))
