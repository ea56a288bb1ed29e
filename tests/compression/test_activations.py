"""Methods that look at activations: each against numpy in float64, in experts, and in models of the families."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.fft import dct
from scipy.linalg import hadamard

from phyla import configs
from phyla.compression.activations import smoothing
from phyla.compression.awq import awq
from phyla.compression.calibrate import Columns, Moments
from phyla.compression.compress import Step, abstract, compress
from phyla.compression.matrices import places
from phyla.compression.quantize import Quantize
from phyla.compression.recipes import parse
from phyla.models import weights
from phyla.models.errors import UserError
from phyla.models.layers import ExpertLinear, Linear
from phyla.models.quantized import Quantized
from phyla.models.wrapped import Rotated, Scaled, Wrapped
from tests.compression.test_compress import batches, built, config, dense, hidden, logits, named

matmul, materialize = jax.jit(weights.matmul), jax.jit(weights.materialize)
of_input, turn = jax.jit(lambda weight, x: weight.of_input(x, weight.own[...])), jax.jit(Rotated.of_input)

METHODS = (
    "awq-int4-g8",
    "w8a8",
    "w8a8-tensor",
    "llm-int8",
    "smoothquant-0.5",
    "smoothquant-0.5-tensor",
    "rotate+w8a8-tensor",
    "rotate+gptq-int4",
)


@functools.cache
def steps(family: str, method: str) -> list[Step]:
    return compress(built(family), parse(method), lambda model, measure: measure(model, batches()))


def inputs(K: int, *, outliers: tuple[int, ...] = (), size: float = 40.0, rows: int = 300, seed: int = 0):
    """Vectors [rows, K] of which some elements are large."""
    x = np.random.default_rng(seed).standard_normal((rows, K)) * np.linspace(0.5, 2, K)
    x[:, list(outliers)] *= size
    return x


def read(x: np.ndarray, path: tuple, stack: tuple[int, ...] = ()) -> Moments:
    """What calibration would say of vectors."""
    a = np.abs(x)
    rows = (a.sum(0), (a**2).sum(0), (a**4).sum(0), (a >= 6).sum(0), np.full(x.shape[1], len(x)), a.max(0))
    widen = lambda v: jnp.broadcast_to(jnp.asarray(v, jnp.float32), (*stack, *np.shape(v)))  # noqa: E731
    return Moments({path: widen(x.T @ x)}, {path: Columns(*map(widen, rows))})


def made(method: str, w: np.ndarray, x: np.ndarray) -> Any:
    """A matrix [K, N] or a stack of experts' after a chain of recipes, calibrated with x."""
    stack = w.shape[:-2]
    holder: Any = nnx.Module()
    axes = ("experts", "embed", "mlp")[-w.ndim :]
    holder.weight = nnx.Param(jnp.asarray(w, jnp.float32), axes=axes, matrix=True, precise="")
    for recipe in parse(method):
        (place,) = places(holder)
        seen, held = jnp.asarray(x, jnp.float32), holder.weight
        while isinstance(held, Wrapped):
            seen, held = of_input(held, seen), held.body
        assert not recipe.apply(
            holder, [place], read(np.asarray(seen, np.float64), place.path, stack), jax.random.key(1)
        ).left
    return holder.weight


def rounded_to(w: np.ndarray, most: int, axis: int = 0) -> np.ndarray:
    step = np.abs(w).max(axis, keepdims=True) / most
    return np.round(w / step) * step


def by_token(x: np.ndarray) -> np.ndarray:
    return rounded_to(x, 127, axis=1)


def test_w8a8_and_llm_int8_are_what_they_say():
    """Per token, per tensor, and with the inputs that reach 6 exact."""
    x, w = inputs(40, outliers=(3, 17)), np.random.default_rng(1).standard_normal((40, 12))
    x8 = jnp.asarray(x, jnp.float32)
    held = {name: made(name, w, x) for name in ("w8a8", "w8a8-tensor", "llm-int8", "llm-int8-1", "llm-int8-9")}
    found = {name: np.asarray(matmul(x8, each), np.float64) for name, each in held.items()}
    W8, largest = rounded_to(w, 127), np.abs(x).max()
    expected = {"w8a8": by_token(x) @ W8, "w8a8-tensor": np.round(x / largest * 127) * largest / 127 @ W8}
    reach = np.argsort(-np.abs(x).max(0))
    for name, room in (("llm-int8", 2), ("llm-int8-1", 1), ("llm-int8-9", 9)):
        outer = [k for k in reach[:room] if np.abs(x[:, k]).max() >= 6]
        assert len(outer) < 9
        inner = np.delete(np.arange(40), outer)
        expected[name] = x[:, outer] @ w[outer] + by_token(x[:, inner]) @ rounded_to(w[inner], 127)
        assert held[name].held.columns.shape == (room,)
    for name, y in expected.items():
        # A quotient may fall on the other side of a half.
        np.testing.assert_allclose(found[name], y, atol=0.004 * np.abs(y).max(), err_msg=name)
        assert np.linalg.norm(found[name] - y) < 2e-3 * np.linalg.norm(y), name
    loss = {name: np.linalg.norm(y - x @ w) for name, y in found.items()}
    assert loss["llm-int8"] < loss["llm-int8-1"] < loss["w8a8"] < loss["w8a8-tensor"]
    assert loss["llm-int8"] < loss["w8a8"] / 5


def test_smoothquant_moves_what_is_large_to_the_weights():
    x, w = inputs(40, outliers=(3, 17)), np.random.default_rng(1).standard_normal((40, 12))
    x[:, 5], w[7] = 0, 0
    largest, most = np.abs(x).max(0), np.abs(w).max(1)
    for alpha in (0.5, 0.8):
        s = np.where((largest > 0) & (most > 0), largest**alpha / np.maximum(most, 1e-9) ** (1 - alpha), 1)
        s[[5, 7]] = 1
        np.testing.assert_allclose(
            smoothing(jnp.asarray(w, jnp.float32), jnp.asarray(largest, jnp.float32), alpha), s, rtol=1e-4
        )
        y = by_token(x / s) @ rounded_to(w * s[:, None], 127)
        found = matmul(jnp.asarray(x, jnp.float32), made(f"smoothquant-{alpha}", w, x))
        assert np.linalg.norm(found - y) < 2e-3 * np.linalg.norm(y)
        scale = np.abs(x / s).max() / 127
        y = np.round(x / s / scale) * scale @ rounded_to(w * s[:, None], 127)
        found = matmul(jnp.asarray(x, jnp.float32), made(f"smoothquant-{alpha}-tensor", w, x))
        assert np.linalg.norm(found - y) < 2e-3 * np.linalg.norm(y)
    plain = matmul(jnp.asarray(x, jnp.float32), made("w8a8-tensor", w, x))
    assert np.linalg.norm(found - x @ w) < np.linalg.norm(plain - x @ w) / 3


def int4(w: np.ndarray, group: int) -> np.ndarray:
    return np.concatenate([rounded_to(w[k : k + group], 7) for k in range(0, len(w), group)])


@pytest.mark.parametrize("group", [8, None])
def test_awq_is_the_search_of_the_paper(group):
    """All powers and ranges tried one by one, in float64; the last group is shorter."""
    K, N = 36, 5
    x, w = inputs(K, outliers=(3, 17), size=8), np.random.default_rng(1).standard_normal((K, N))
    H, size, width = x.T @ x, np.abs(x).mean(0), group or K
    loss = lambda v: np.trace((v - w).T @ H @ (v - w))  # noqa: E731
    tried = []
    for r in np.arange(20) / 20:
        s = size**r
        s = s / np.sqrt(s.max() * s.min())
        tried.append((loss(int4(w * s[:, None], width) / s[:, None]), r, s))
    _, power, s = min(tried, key=lambda found: found[0])
    assert power > 0
    scaled, cut = w * s[:, None], np.zeros((K, N))
    for k in range(0, K, width):
        part = slice(k, k + width)
        for n in range(N):
            column, best = scaled[part, n], np.inf
            for share in 1 - np.arange(10) / 20:
                limit = share * np.abs(column).max()
                found = rounded_to(np.clip(column, -limit, limit), 7)
                change = (found - column) / s[part]
                if change @ H[part, part] @ change < best:
                    best, cut[part, n] = change @ H[part, part] @ change, found
    expected = cut / s[:, None]
    given = (jnp.asarray(a, jnp.float32) for a in (w, H, size))
    scale, held = awq(*given, Quantize(format="int4", group=group), True)
    np.testing.assert_allclose(scale, s, rtol=1e-4)
    found = np.asarray(materialize(Scaled(Quantized(held, ("a", "b")), 1 / scale, ("a",))), np.float64)
    wrong = np.abs(found - expected) > 1e-4
    assert wrong.mean() < 0.02  # a quotient may fall on the other side of a half
    assert loss(found) == pytest.approx(loss(expected), rel=0.02)
    assert loss(found) < 0.8 * loss(int4(w, width))


@pytest.mark.parametrize(("K", "odd"), [(32, ()), (24, (3,)), (7, (7,)), (90, (45,)), (290, (5, 29))])
def test_a_rotation_is_orthogonal_and_spreads(K, odd):
    """Against the matrices of scipy."""
    signs = np.random.default_rng(0).choice([-1, 1], K).astype(np.int8)
    Q = np.asarray(turn(jnp.eye(K), signs), np.float64)
    two = K & -K
    cosines = np.eye(1)
    for factor in odd:
        cosines = np.kron(cosines, np.array(dct(np.eye(factor), axis=0, norm="ortho"), np.float64))
    expected = signs[:, None] * np.kron(cosines, hadamard(two) / np.sqrt(two))
    np.testing.assert_allclose(Q, expected, atol=1e-6)
    np.testing.assert_allclose(Q @ Q.T, np.eye(K), atol=1e-6)
    assert np.abs(Q).max() <= np.sqrt(2 ** len(odd) / K) * 1.001
    x, w = inputs(K), np.random.default_rng(1).standard_normal((K, 6))
    turned = made("rotate", w, x)
    assert isinstance(turned, Rotated)
    np.testing.assert_allclose(materialize(turned), w, atol=1e-5)
    np.testing.assert_allclose(matmul(jnp.asarray(x, jnp.float32), turned), x @ w, atol=1e-4)
    bfloat16 = matmul(jnp.asarray(x, jnp.bfloat16), turned)
    assert bfloat16.dtype == jnp.bfloat16


def test_rotation_helps_one_scale_for_all():
    x, w = inputs(64, outliers=(3,)), np.random.default_rng(1).standard_normal((64, 12))
    loss = {
        name: np.linalg.norm(matmul(jnp.asarray(x, jnp.float32), made(name, w, x)) - x @ w)
        for name in ("w8a8-tensor", "rotate+w8a8-tensor")
    }
    assert loss["rotate+w8a8-tensor"] < loss["w8a8-tensor"] / 2


@pytest.mark.parametrize("method", ["awq-int4", "w8a8", "w8a8-tensor", "llm-int8-2", "smoothquant-0.5", "rotate"])
def test_experts_sorted_and_chosen_are_the_same(method):
    """Each expert alone, in numpy's loop; rows after the last group give zeros."""
    E, K, N = 3, 16, 5
    x = inputs(K, outliers=(3,), rows=20)
    w = np.random.default_rng(2).standard_normal((E, K, N))
    linear = ExpertLinear(E, (K, N), ("embed", "mlp"), nnx.Rngs(0))
    linear.weight = made(method, w, x)
    sizes, rows = np.array([5, 0, 12]), jnp.asarray(x, jnp.float32)
    expert = np.repeat(np.arange(E), sizes)
    found = np.asarray(nnx.jit(lambda linear: linear(rows, sizes))(linear))
    one = lambda e: jax.tree.map(lambda leaf: leaf[e], linear.weight)  # noqa: E731
    alone = [matmul(rows[n][None], one(int(e)))[0] for n, e in enumerate(expert)]
    np.testing.assert_allclose(found[: len(expert)], alone, atol=1e-3)
    np.testing.assert_array_equal(found[len(expert) :], 0)
    np.testing.assert_allclose(
        nnx.jit(lambda linear: linear.chosen(rows[: len(expert)], expert))(linear), alone, atol=1e-3
    )
    exact = np.einsum("nk,nko->no", x[: len(expert)], w[expert])
    assert np.linalg.norm(found[: len(expert)] - exact) < 0.15 * np.linalg.norm(exact)


QUICK = {("transformer", "rotate+w8a8-tensor"), ("mamba", "awq-int4-g8"), ("mamba", "llm-int8")}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if (family, method) in QUICK else pytest.mark.slow)
        for family in configs.SMALL
        for method in METHODS
    ],
)
def test_each_family(family, method):
    """The answers are near; nothing is listed twice; the names of the recipes give the shapes."""
    last = steps(family, method)[-1]
    found, original = logits(last.model), logits(built(family))
    error = np.linalg.norm(found - original) / np.linalg.norm(original)
    assert 1e-5 < error < (0.9 if "int4" in method else 0.35)
    if "int4" in method:
        np.testing.assert_allclose(found, logits(dense(last.model)), atol=2e-4 * np.abs(found).max())
    names = {place.name for place in places(built(family))}
    assert set(last.changed) | last.left.keys() == names == set(named(last.model))
    shapes = jax.eval_shape(lambda: nnx.state(abstract(config(family), parse(method))))
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(last.model))]
    assert described == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)]
    assert jax.tree.structure(nnx.state(last.model)) == jax.tree.structure(shapes)


def test_llm_int8_recovers_an_injected_outlier():
    """One channel of a norm 60 times larger, and its weights as much smaller: the same model, for float32."""
    model = nnx.clone(built("transformer"))
    blocks: Any = model.periods.blocks
    for block in blocks:
        for norm, linears in (
            (block.mixer_norm, [block.mixer.q, block.mixer.k, block.mixer.v]),
            (block.channel_norm, [value for _, value in nnx.iter_children(block.channel) if isinstance(value, Linear)]),
        ):
            norm.scale[...] = norm.scale[...].at[:, 5].multiply(60.0)
            linear: Any
            for linear in linears:
                if linear.weight.shape[-2] == model.config.width:
                    linear.weight[...] = linear.weight[...].at[:, 5].divide(60.0)
    original = hidden(built("transformer"))
    np.testing.assert_allclose(hidden(model), original, atol=1e-3)
    calibrate = lambda model, measure: measure(model, batches())  # noqa: E731
    error = {
        name: np.linalg.norm(hidden(compress(model, parse(name), calibrate)[-1].model) - original)
        for name in ("w8a8", "llm-int8-1")
    }
    assert error["llm-int8-1"] < error["w8a8"] / 4


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("int8+w8a8", "every matrix is quantized already"),
        ("w8a8+rotate", "every matrix is quantized already"),
        ("rotate@embedding", "embedding.weight stays as it is \\(heads and tables of the vocabulary are not rotated"),
        ("awq-int4@router", "router.weight stays as it is \\(it chooses the experts\\)"),
        ("llm-int8-0", "there must be room for an input; nearest: llm-int8-1"),
        ("smoothquant-1.5", "nearest: smoothquant-0.5"),
        ("awq-int4-g7", "a group is a multiple of 2; nearest: int4-g8"),
        ("awq-nf4", "no method 'awq-nf4'; nearest: nf4"),
    ],
)
def test_refusals(method, error):
    with pytest.raises(UserError, match=error):
        abstract(config("jamba"), parse(method))
