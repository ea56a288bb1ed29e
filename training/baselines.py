"""What a model must beat on the same text: n-gram models over bytes, and xz."""

import lzma

import numpy as np

MAX_ORDER = 5


def baselines(train: bytes, validation: bytes) -> dict[str, float]:
    """Return bits per byte of `validation` for models that know `train`.

    "1-gram" to "5-gram" are interpolated byte models (`ngram_probabilities`), "xz" compresses the validation text
    alone, "xz primed" is what it adds to the compressed training text.

    Raises:
        ValueError: one of the texts is empty.
    """
    if not train or not validation:
        raise ValueError(f"baselines need text: {len(train)} training and {len(validation)} validation bytes")
    probabilities_NxL = ngram_probabilities(train, validation, MAX_ORDER)
    bits = {f"{n}-gram": float(-np.log2(p).mean()) for n, p in enumerate(probabilities_NxL, 1)}
    bits["xz"] = 8.0 * _xz_size(validation) / len(validation)
    bits["xz primed"] = 8.0 * (_xz_size(train + validation) - _xz_size(train)) / len(validation)
    return bits


def ngram_probabilities(train: bytes, text: bytes, max_order: int) -> np.ndarray:
    """Return the probability of each byte of `text` under the models of order 1 to `max_order`.

    Witten-Bell interpolation (Witten & Bell 1991; Chen & Goodman 1998, eq. 17): with h the n-1 bytes before, c(h) how
    often they were followed by anything in `train` and t(h) by how many different bytes,

        p_n(x | h) = (c(h x) + t(h) p_{n-1}(x | h')) / (c(h) + t(h)),    p_0(x) = 1 / 256.

    Where h was not seen, or the text is too young to have n-1 bytes before, p_n = p_{n-1}.

    Args:
        train: the text that is counted.
        text: the text that is predicted.
        max_order: largest n, at most 8 (n bytes are one uint64).

    Returns:
        float64 [max_order, len(text)].
    """
    if not 1 <= max_order <= 8:
        raise ValueError(f"max_order must lie in 1..8, not {max_order}")
    probabilities_NxL = np.empty((max_order, len(text)))
    p_L = np.full(len(text), 1.0 / 256.0)
    for n in range(1, max_order + 1):
        if n <= min(len(train), len(text)):
            grams_G, counts_G = np.unique(_grams(train, n), return_counts=True)
            contexts_C, first_C, distinct_C = np.unique(grams_G >> 8, return_index=True, return_counts=True)
            totals_C = np.add.reduceat(counts_G, first_C)  # the grams of a context are neighbours

            asked_L = _grams(text, n)
            count_L = _look_up(grams_G, counts_G, asked_L)
            total_L = _look_up(contexts_C, totals_C, asked_L >> 8)
            distinct_L = _look_up(contexts_C, distinct_C, asked_L >> 8)
            seen_L = total_L > 0
            lower_L = p_L[n - 1 :]
            mixed_L = (count_L + distinct_L * lower_L) / np.where(seen_L, total_L + distinct_L, 1)
            p_L[n - 1 :] = np.where(seen_L, mixed_L, lower_L)
        probabilities_NxL[n - 1] = p_L
    return probabilities_NxL


def _grams(text: bytes, n: int) -> np.ndarray:
    """Return all n-grams as integers, the last byte lowest: uint64 [len(text) - n + 1]."""
    bytes_L = np.frombuffer(text, np.uint8)
    grams = np.zeros(len(text) - n + 1, np.uint64)
    for i in range(n):
        grams = grams << 8 | bytes_L[i : i + len(grams)]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return values[i] where keys[i] is asked for, 0 where it is absent; keys are sorted."""
    i = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[i] == asked, values[i], 0)


def _xz_size(text: bytes) -> int:
    # a dictionary that reaches over the whole text (4 KiB to 1.5 GiB is what the format allows), and no memory for more
    size = min(max(len(text), 4096), 1536 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return len(lzma.compress(text, filters=filters))
