"""Zeros: the smallest of a matrix, of all, of an output or of a group, and that they stay through what follows."""

import math

import numpy as np
import pytest

from phyla import configs
from phyla.compression.compress import compress
from phyla.compression.recipes import parse
from tests.compression.test_compress import built, values


@pytest.mark.parametrize("family", configs.SMALL)
def test_a_share_is_pruned(family):
    """Of each matrix exactly the smallest 40 %; of all together exactly the smallest 30 %."""
    before = values(built(family))
    (each,) = compress(built(family), parse("magnitude-40%"))
    after = values(each.model)
    for name in each.changed:
        for W, found in zip(
            *(a[name].reshape(-1, math.prod(a[name].shape[-2:])) for a in (before, after)), strict=True
        ):
            gone = found == 0
            assert gone.sum() == round(0.4 * W.size)
            assert np.abs(W[gone]).max() <= np.abs(W[~gone]).min()
            np.testing.assert_array_equal(found[~gone], W[~gone])
    (together,) = compress(built(family), parse("magnitude-30%-global"))
    after = values(together.model)
    W, found = (np.concatenate([a[name].ravel() for name in together.changed]) for a in (before, after))
    gone = found == 0
    assert gone.sum() == round(0.3 * W.size)
    assert np.abs(W[gone]).max() <= np.abs(W[~gone]).min()
    shares = {np.mean(after[name] == 0).round(2) for name in together.changed}
    assert len(shares) > 1


def test_a_share_of_each_output_is_pruned():
    before = values(built("jamba"))
    (step,) = compress(built("jamba"), parse("magnitude-40%-rows"))
    after = values(step.model)
    assert any(before[name].ndim > 3 for name in step.changed)  # experts too
    for name in step.changed:
        W, found = (a[name].reshape(-1, *a[name].shape[-2:]) for a in (before, after))
        kept = found != 0
        assert np.all((~kept).sum(axis=1) == round(0.4 * W.shape[1]))
        assert np.all(np.where(kept, 0, np.abs(W)).max(axis=1) <= np.where(kept, np.abs(W), np.inf).min(axis=1))
        np.testing.assert_array_equal(found[kept], W[kept])


@pytest.mark.parametrize(("family", "keep", "group"), [*((f, 2, 4) for f in configs.SMALL), ("jamba", 5, 7)])
def test_n_of_m_stay(family, keep, group):
    before = values(built(family))
    (step,) = compress(built(family), parse(f"magnitude-{keep}:{group}"))
    after = values(step.model)
    for name, W in before.items():
        if name in step.left:
            np.testing.assert_array_equal(after[name], W)
            continue
        K, N = W.shape[-2:]
        for matrix, found in zip(W.reshape(-1, K, N), after[name].reshape(-1, K, N), strict=True):
            for begin in range(0, K, group):
                w, f = matrix[begin : begin + group], found[begin : begin + group]
                assert np.all((f != 0).sum(0) == min(keep, len(w)))
                np.testing.assert_array_equal(f[f != 0], w[f != 0])
                largest = np.sort(np.abs(w), axis=0)[::-1][: min(keep, len(w))].sum(0)
                np.testing.assert_allclose(np.abs(f).sum(0), largest, rtol=1e-5)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_what_is_pruned_stays_zero(method):
    """And a rounded model is only what its recipes say, in their order."""
    pruned, rounded_ = compress(built("jamba"), parse(f"magnitude-2:4+{method}"))
    before, after = values(pruned.model), values(rounded_.model)
    for name in pruned.changed:
        assert np.all(after[name][before[name] == 0] == 0)
        assert np.mean(after[name] == 0) >= 0.5
    alone = values(compress(pruned.model, parse(method))[0].model)
    for name, found in after.items():
        np.testing.assert_array_equal(found, alone[name])
