import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phyla.training.baselines import baselines, ngram_probabilities

TRAIN = b"the cat sat on the mat. the dog sat on the log. " * 3 + b"a cat is a cat is a cat."
TEXT = b"the cat and the dog sat on the mat \xff\x00"


def slow_probability(train: bytes, history: bytes, byte: int, order: int) -> float:
    """Witten-Bell written as it is defined: one context, one byte, one recursion."""
    if order == 0:
        return 1 / 256
    if len(history) < order - 1:
        return slow_probability(train, history, byte, order - 1)
    context = history[len(history) - (order - 1) :]
    followers = collections.Counter(
        train[i + order - 1] for i in range(len(train) - order + 1) if train[i : i + order - 1] == context
    )
    lower = slow_probability(train, history, byte, order - 1)
    if not followers:
        return lower
    return (followers[byte] + len(followers) * lower) / (followers.total() + len(followers))


def test_it_is_the_model_of_the_definition():
    expected = [[slow_probability(TRAIN, TEXT[:i], TEXT[i], n) for i in range(len(TEXT))] for n in range(1, 6)]
    np.testing.assert_allclose(ngram_probabilities(TRAIN, TEXT, 5), expected, rtol=1e-12)


@given(train=st.binary(min_size=1, max_size=30), text=st.binary(min_size=1, max_size=6), order=st.integers(1, 8))
def test_any_text_as_in_the_definition(train, text, order):
    text = train[:3] + text
    expected = [slow_probability(train, text[:i], text[i], order) for i in range(len(text))]
    np.testing.assert_allclose(ngram_probabilities(train, text, order)[-1], expected, rtol=1e-12)


@pytest.mark.parametrize("history", [b"", b"t", b"the c", b"cat", b"\xff\xff\xff\xff", b"og. "])
def test_probabilities_of_the_next_byte_sum_to_one(history):
    total_N = sum(ngram_probabilities(TRAIN, history + bytes([byte]), 5)[:, -1] for byte in range(256))
    np.testing.assert_allclose(total_N, np.ones(5), rtol=1e-12)


def test_known_figures():
    # "aaaa": of the unigram 4 counts and 1 kind, so (4 + 1/256) / 5; of the bigram 3 counts after "a"
    uni = (4 + 1 / 256) / 5
    bi = (3 + uni) / 4
    bits = baselines(b"aaaa", b"aa")
    assert bits["1-gram"] == pytest.approx(-math.log2(uni))
    assert bits["2-gram"] == pytest.approx(-(math.log2(uni) + math.log2(bi)) / 2)
    # a byte that was never seen shares 1 of 5 with all others
    assert baselines(b"aaaa", b"b")["1-gram"] == pytest.approx(-math.log2(1 / 256 / 5))
    assert list(bits) == ["1-gram", "2-gram", "3-gram", "4-gram", "5-gram", "xz", "xz primed"]


def test_xz():
    rng = np.random.default_rng(0)
    noise, zeros = rng.bytes(20_000), bytes(20_000)
    assert 8.0 < baselines(zeros, noise)["xz"] < 8.1
    assert baselines(noise, zeros)["xz"] < 0.1
    # the dictionary reaches 220 kB back; a match says at most 273 bytes, hence not 0
    primed = baselines(noise + rng.bytes(200_000), noise)
    assert 8.0 < primed["xz"] < 8.1
    assert primed["xz primed"] < 0.5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 training and 1 validation bytes"):
        baselines(b"", b"a")
    with pytest.raises(ValueError, match="1 training and 0 validation bytes"):
        baselines(b"a", b"")
    with pytest.raises(ValueError, match=r"max_order must lie in 1\.\.8, not 9"):
        ngram_probabilities(b"a", b"a", 9)
