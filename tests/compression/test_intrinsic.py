"""Tuning within a random subspace, against the matrix of the projection itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.compression.compress import abstract, compress
from phyla.compression.matrices import dotted
from phyla.compression.recipes import parse
from phyla.models import subspace
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.weights import trainable
from phyla.models.wrapped import hadamard
from phyla.training.step import split
from tests.compression.test_adapters import built, config, disturbed, logits, plain

KEY = jax.random.key(3)
NAMES = ("intrinsic-20", "intrinsic-20-fastfood")


def sylvester(n: int) -> np.ndarray:
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.kron([[1, 1], [1, -1]], H)
    return H


def dense_signs(d: int, size: int) -> np.ndarray:
    """P [size, d], from the same bits, one by one."""
    rows = []
    for key in jax.random.split(KEY, -(-size // subspace.ROWS)):
        words = np.asarray(jax.random.bits(key, (subspace.ROWS, -(-d // 32), 1), jnp.uint32))[..., 0]
        rows += [[-1.0 if int(row[i // 32]) >> (i % 32) & 1 else 1.0 for i in range(d)] for row in words]
    return np.array(rows[:size]) / math.sqrt(size)


def dense_fastfood(d: int, size: int) -> np.ndarray:
    """P [size, d]: H G Π H B as matrices, by blocks, from the same draws."""
    n = 2 ** math.ceil(math.log2(d))
    H, blocks = sylvester(n), []
    for_order, for_blocks = jax.random.split(KEY)
    order = np.eye(n)[np.asarray(jax.random.permutation(for_order, n))]
    for key in jax.random.split(for_blocks, -(-size // n)):
        for_B, for_G = jax.random.split(key)
        B = np.diag(np.asarray(jax.random.rademacher(for_B, (n,), jnp.float32), np.float64))
        g = np.asarray(jax.random.normal(for_G, (n,)), np.float64)
        blocks.append(H @ np.diag(g) @ order @ H @ B / math.sqrt(n * np.sum(g**2)))
    # Each block is as long as v; D / n of them together are made so.
    return np.concatenate(blocks)[:size, :d] * math.sqrt(n / size)


@pytest.mark.parametrize(
    ("of", "dense"), [(subspace.signs, dense_signs), (subspace.fastfood, dense_fastfood)], ids=["signs", "fastfood"]
)
def test_the_projection_is_the_matrix(of, dense):
    """Its product and its gradient; v fills neither a word nor a block, and neither do the parameters."""
    d, size = 37, 2500
    rng = np.random.default_rng(0)
    v, g = rng.standard_normal(d), rng.standard_normal(size)
    P = dense(d, size)
    project = jax.jit(lambda v: jax.vjp(lambda v: of(v, KEY, size), v))
    found, back = project(jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(found, P @ v, atol=1e-5)
    np.testing.assert_allclose(back(jnp.asarray(g, jnp.float32))[0], P.T @ g, atol=1e-4)
    # Columns are 1 long, and nearly orthogonal.
    gram = P.T @ P
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-6 if of is subspace.signs else 0.15)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 6 / math.sqrt(size)


def test_hadamard():
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    np.testing.assert_allclose(hadamard(jnp.asarray(x)), x @ sylvester(16) / 4, atol=1e-5)


def parameters(model: LanguageModel) -> dict[str, np.ndarray]:
    return {dotted(path): np.asarray(each[...]) for path, each in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_by_its_rows(name):
    """From θ₀, to the bit, to θ₀ + P v: merged, and as it answers."""
    model = compress(built("mamba"), parse(name))[-1].model
    np.testing.assert_array_equal(logits(model), plain("mamba"))
    disturbed(model, trainable)
    before = parameters(built("mamba"))
    paths = [dotted(path) for path in model.subspace.paths]
    assert set(paths) == before.keys()
    dense = dense_signs if name == NAMES[0] else dense_fastfood
    size = sum(each.size for each in before.values())
    global KEY
    key, KEY = KEY, jax.random.wrap_key_data(model.subspace.key[...])
    P, KEY = dense(20, size), key
    offset, first = P @ np.asarray(model.subspace.v[...], np.float64), 0
    merged = compress(model, parse("merge"))[-1].model
    assert merged.subspace is None
    after = parameters(merged)
    for path in paths:
        right = before[path] + offset[first : first + before[path].size].reshape(before[path].shape)
        np.testing.assert_allclose(after[path], right, atol=1e-5)
        first += before[path].size
    assert first == size
    answers = logits(merged)
    np.testing.assert_allclose(logits(model), answers, atol=1e-5)
    assert np.abs(answers - plain("mamba")).max() > 0.01
    dense_one = nnx.to_flat_state(nnx.state(built("mamba"), nnx.Param))
    said = [each.get_metadata() for _, each in nnx.to_flat_state(nnx.state(merged, nnx.Param))]
    assert [each["precise"] for each in said] == [each.get_metadata()["precise"] for _, each in dense_one]
    assert all(each["trainable"] for each in said)


def test_only_v_is_trained_and_the_rest_is_the_base_and_a_seed():
    """What is trained is d numbers, what is frozen is the base and a key of eight bytes."""
    model = compress(built("mamba"), parse(NAMES[1]))[-1].model
    _, params, frozen = split(model)
    (v,) = jax.tree.leaves(params)
    assert v.shape == (20,)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)) == 8 + 4 * sum(
        each.size for each in parameters(built("mamba")).values()
    )
    again = compress(built("mamba"), parse(NAMES[1]))[-1].model
    for one, other in zip(jax.tree.leaves(split(again)[2]), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(one, other)
    other = compress(built("mamba"), parse(NAMES[1]), seed=1)[-1].model
    assert not np.array_equal(other.subspace.key[...], model.subspace.key[...])


def test_it_moves_what_was_trained_before():
    """Over an adapter, that adapter."""
    model = abstract(config("mamba"), parse("lora-r2+intrinsic-5"))
    assert {path[-1] for path in model.subspace.paths} == {"A", "B"}
    model = abstract(config("mamba"), parse("intrinsic-5@norm"))
    assert {path[-1] for path in model.subspace.paths} == {"scale"}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("intrinsic-0", "nearest: intrinsic-1"),
        ("intrinsic-99999999", "numbers; nearest: intrinsic-"),
        ("intrinsic-5@nothing", "'nothing' is in no path"),
        ("intrinsic-5+intrinsic-6", "moves in a subspace already"),
        ("intrinsic-5+int8", "merge it first"),
        ("intrinsic-5+prune-states-50%", "merge it first"),
    ],
)
def test_what_cannot_be_is_an_error(name, error):
    with pytest.raises(UserError, match=error):
        abstract(config("mamba"), parse(name))
