"""K-means against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla import configs
from phyla.compression.cluster import cluster
from phyla.compression.compress import abstract, compress
from phyla.compression.recipes import parse
from phyla.kernels.quantized_matmul import Codebook
from phyla.models.errors import UserError
from phyla.models.quantized import Quantized
from tests.compression.test_compress import built, config, dense, logits, named, values


def lloyd(w: np.ndarray, count: int) -> np.ndarray:
    """Means in float64, from a linear start; the distances of all to all."""
    means = np.linspace(w.min(), w.max(), count)
    for _ in range(200):
        nearest = np.abs(w.ravel()[:, None] - means).argmin(1)
        moved = np.array([w.ravel()[nearest == i].mean() if (nearest == i).any() else m for i, m in enumerate(means)])
        if np.array_equal(moved, means):
            break
        means = moved
    return means


@pytest.mark.parametrize("count", [2, 8, 64])
def test_means(count):
    W = np.random.default_rng(count).standard_normal((2, 40, 30)).astype(np.float32)
    found = cluster(jnp.asarray(W), count)
    assert found.bits_per_weight == np.log2(count) + 32 * count / 1200
    for w, book, held in zip(W, found.book, jax.vmap(Codebook.materialize)(found), strict=True):
        means = lloyd(w.astype(np.float64), count)
        np.testing.assert_allclose(book, means, atol=1e-5)
        np.testing.assert_allclose(held, means[np.abs(w[..., None] - means).argmin(-1)], atol=1e-5)


def test_zeros_have_a_mean_of_their_own():
    """What is zero stays so, exactly, and nothing else becomes it; all zeros, or one value, are no special case."""
    w = np.random.default_rng(0).standard_normal((64, 50)).astype(np.float32)
    w[np.abs(w) < 1] = 0
    found = np.asarray(cluster(jnp.asarray(w), 16).materialize())
    np.testing.assert_array_equal(found == 0, w == 0)
    means = lloyd(w[w != 0].astype(np.float64), 15)
    expected = np.where(w == 0, 0, means[np.abs(w[..., None] - means).argmin(-1)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for same in (np.zeros((8, 8)), np.full((8, 8), -3.0)):
        np.testing.assert_array_equal(cluster(jnp.asarray(same, jnp.float32), 4).materialize(), same)


FAMILIES = [f if f == "jamba" else pytest.param(f, marks=pytest.mark.slow) for f in configs.SMALL]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Of each matrix of each stack few values are left; the model uses them; tables of the vocabulary too."""
    pruned, step = compress(built(family), parse("magnitude-40%+kmeans-8"))
    before, after = values(pruned.model), values(step.model)
    for name, weight in named(step.model).items():
        if name in step.left:
            np.testing.assert_array_equal(after[name], before[name])
            continue
        assert isinstance(weight, Quantized)
        K, N = after[name].shape[-2:]
        for w, found in zip(before[name].reshape(-1, K, N), after[name].reshape(-1, K, N), strict=True):
            assert len(np.unique(found)) <= 8
            np.testing.assert_array_equal(found == 0, w == 0)
            assert np.square(found - w).mean() < 0.1 * np.square(w).mean()
    assert {"embedding.weight"} < set(step.changed)
    found = logits(step.model)
    np.testing.assert_allclose(found, logits(dense(step.model)), atol=2e-4 * np.abs(found).max())
    shapes = jax.eval_shape(lambda: abstract(config(family), parse("magnitude-40%+kmeans-8")))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(shapes)) == jax.tree.map(jnp.shape, jax.tree.leaves(step.model))


@pytest.mark.parametrize(
    ("chain", "error"),
    [
        ("kmeans-12", "kmeans-12: as many as codes of whole bits have, 2 to 256; nearest: kmeans-8"),
        ("kmeans-1", "nearest: kmeans-2"),
        ("kmeans-1024", "nearest: kmeans-256"),
        ("kmeans-16+kmeans-8", "kmeans-8 changes nothing in this model: every matrix is quantized already"),
    ],
)
def test_refusals(chain, error):
    with pytest.raises(UserError, match=error):
        abstract(config("transformer"), parse(chain))
