"""Low rank against numpy in float64, and what goes with it: ranks, chains, reasons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla import configs
from phyla.compression.compress import abstract, compress
from phyla.compression.factorise import factors, singular_values
from phyla.compression.feedback import DAMPING
from phyla.compression.matrices import places, weights
from phyla.compression.recipes import parse
from phyla.models.errors import UserError
from phyla.models.lowrank import LowRank
from phyla.models.quantized import Quantized
from tests.compression.test_compress import batches, built, config, dense, hidden, logits, named, values

K, N = 24, 15


def problem():
    """Two matrices, and the moments of correlated inputs of each."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 200, 6)) @ rng.standard_normal((2, 6, K)) + 0.1 * rng.standard_normal((2, 200, K))
    return rng.standard_normal((2, K, N)), x, np.einsum("stk,stl->skl", x, x)


def nearest(W: np.ndarray, rank: int) -> np.ndarray:
    U, s, Vt = np.linalg.svd(W)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


def test_the_nearest_of_a_rank():
    """By singular values, the same in both factors; all of them are the matrix itself."""
    W, _, moment = problem()
    down, up = factors(jnp.asarray(W, jnp.float32), None, 5)
    for w, a, b in zip(W, np.asarray(down, np.float64), np.asarray(up, np.float64), strict=True):
        np.testing.assert_allclose(a @ b, nearest(w, 5), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)
    for given in (None, jnp.asarray(moment, jnp.float32)):
        down, up = factors(jnp.asarray(W, jnp.float32), given, N)
        np.testing.assert_allclose(np.asarray(down, np.float64) @ np.asarray(up, np.float64), W, atol=2e-5)


def test_weighted_by_activations_the_answers_are_nearest():
    """W' of rank r with the least |R (W - W')|, by another root R of the damped moments than ours: Cholesky's."""
    W, x, moment = problem()
    down, up = factors(jnp.asarray(W, jnp.float32), jnp.asarray(moment, jnp.float32), 5)
    for w, inputs, H, a, b in zip(W, x, moment, *(np.asarray(each, np.float64) for each in (down, up)), strict=True):
        R = np.linalg.cholesky(H + DAMPING * np.mean(np.diag(H)) * np.eye(K)).T
        np.testing.assert_allclose(a @ b, np.linalg.solve(R, nearest(R @ w, 5)), atol=2e-4)
        assert np.linalg.norm(inputs @ (a @ b - w)) < 0.7 * np.linalg.norm(inputs @ (nearest(w, 5) - w))
    unseen = factors(jnp.asarray(W, jnp.float32), jnp.zeros_like(moment), 5)
    np.testing.assert_allclose(unseen[0] @ unseen[1], [nearest(w, 5) for w in W], atol=1e-5)


FAMILIES = [f if f == "jamba" else pytest.param(f, marks=pytest.mark.slow) for f in configs.SMALL]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_the_parameters(family):
    """In every matrix, experts' too; the model uses the factors that it holds; its names give the shapes."""
    (step,) = compress(built(family), parse("svd-0.5"))
    before, after = values(built(family)), values(step.model)
    for name, weight in named(step.model).items():
        if name in step.left:
            np.testing.assert_array_equal(after[name], before[name])
            continue
        assert isinstance(weight, LowRank)
        *_, K, N = before[name].shape
        rank = weight.down.shape[-1]
        assert rank * (K + N) <= K * N / 2 < (rank + 1) * (K + N)
        assert weight.nbytes == 4 * rank * (K + N) * before[name].size // (K * N)
        for w, found in zip(before[name].reshape(-1, K, N), after[name].reshape(-1, K, N), strict=True):
            np.testing.assert_allclose(found, nearest(w.astype(np.float64), rank), atol=2e-5)
    found, original = logits(step.model), logits(built(family))
    np.testing.assert_allclose(found, logits(dense(step.model)), atol=2e-4 * np.abs(found).max())
    assert np.abs(found - original).max() > 0.01
    shapes = jax.eval_shape(lambda: abstract(config(family), parse("svd-0.5")))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(shapes)) == jax.tree.map(jnp.shape, jax.tree.leaves(step.model))


@pytest.mark.parametrize("family", ["xlstm", *(pytest.param(f, marks=pytest.mark.slow) for f in configs.SMALL)])
def test_activations_are_worth_reading(family):
    (plain,), (weighted,) = (
        compress(built(family), parse(name), lambda model, measure: measure(model, batches()))
        for name in ("svd-0.5", "asvd-0.5")
    )
    assert plain.changed == weighted.changed
    answers = hidden(built(family))
    assert np.linalg.norm(hidden(weighted.model) - answers) < np.linalg.norm(hidden(plain.model) - answers)


def test_energy_is_recorded_as_ranks():
    """The largest that a matrix of the stack needs; what would not be smaller is left, with the reason."""
    (step,) = compress(built("xlstm"), parse("svd-88%"))
    assert all(str(rule).startswith("svd-r") for rule in step.rules)
    again = compress(built("xlstm"), step.rules)[-1].model
    for found, other in zip(jax.tree.leaves(step.model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(found, other)
    left = 0
    for place in places(built("xlstm")):
        if place.kind == "matrix":
            s = np.linalg.svd(np.asarray(place.value[...], np.float64), compute_uv=False).reshape(
                -1, min(place.value.shape[-2:])
            )
            share = np.cumsum(s**2, 1) / np.sum(s**2, 1, keepdims=True)
            rank = max(int(np.argmax(row >= 0.88)) + 1 for row in share)
            weight = weights(step.model)[place.path]
            if place.name in step.left:
                left += 1
                assert f"rank {rank} would not be smaller" in step.left[place.name]
            else:
                assert isinstance(weight, LowRank)
                assert weight.down.shape[-1] == rank
    assert 0 < left < len(step.changed) + left
    np.testing.assert_allclose(singular_values(jnp.diag(jnp.array([3.0, -2.0])), None), [3, 2], rtol=1e-6)


def test_factors_are_compressed_further():
    """They are matrices with all that a matrix says of itself, and one weight of the model together."""
    first, second = compress(built("jamba"), parse("svd-0.5+nf4"))
    assert set(weights(second.model)) == set(weights(built("jamba")))
    weight = named(second.model)["periods.blocks.1.mixer.in_proj.weight"]
    assert isinstance(weight, LowRank)
    assert isinstance(weight.down, Quantized)
    assert isinstance(weight.up, Quantized)
    assert weight.nbytes == weight.down.nbytes + weight.up.nbytes
    down = next(p for p in places(first.model) if p.name == "periods.blocks.1.channel.up.weight.down")
    assert down.axes == ("layers", "experts", "embed", "rank")
    original = {p.name: p for p in places(built("jamba"))}["periods.blocks.1.channel.up.weight"].value.get_metadata()
    assert down.value.get_metadata() == original | {"axes": down.axes}
    found = logits(second.model)
    np.testing.assert_allclose(found, logits(dense(second.model)), atol=2e-4 * np.abs(found).max())


@pytest.mark.parametrize(
    ("chain", "error"),
    [
        ("svd-r31", "factors of rank 31 would not be smaller"),
        ("svd-0.01", "not even factors of rank 1 are so small"),
        ("svd-0.5@embedding", "embedding.weight stays as it is \\(heads and tables"),
        ("int8+svd-0.5", "every matrix is quantized already"),
        ("svd-r0", "svd-r0: the least rank is 1; nearest: svd-r1"),
        ("svd-1.5", "nearest: svd-0.5"),
        ("asvd-100%", "nearest: asvd-90%"),
    ],
)
def test_refusals(chain, error):
    with pytest.raises(UserError, match=error):
        abstract(config("transformer"), parse(chain))


@pytest.mark.parametrize("name", ["svd-0.25", "svd-99.5%", "asvd-90%", "svd-r12@^(a\\.b|c)$"])
def test_names(name):
    (recipe,) = parse(name)
    assert str(recipe) == name
