"""Mixed precision: by name, and as measured under a budget."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla import configs
from phyla.compression.calibrate import Moments, moments
from phyla.compression.compress import abstract, compress
from phyla.compression.matrices import places, weights
from phyla.compression.mixed import CANDIDATES, MORE, Choice, choices, spend
from phyla.compression.quantize import rounded
from phyla.compression.recipes import parse
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized


def config(family: str) -> ModelConfig:
    """Of 64 channels, which blocks of 32 divide."""
    model = configs.experiment(family).model
    return dataclasses.replace(model, width=64, layers=max(2, len(model.pattern)), vocab_size=61, groups=None)


def model_of(family: str) -> LanguageModel:
    model = LanguageModel(config(family), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable[...] = np.asarray(variable[...]) + 0.1 * rng.standard_normal(variable.shape, np.float32)
    return model


def text():
    for key in jax.random.split(jax.random.key(3), 3):
        tokens = jax.random.randint(key, (2, 12), 0, 61)
        yield tokens, jnp.ones_like(tokens)


def held(model: LanguageModel) -> dict[str, str]:
    found = {".".join(map(str, path)): weight for path, weight in weights(model).items()}
    return {name: getattr(each.held, "kind", "") for name, each in found.items() if isinstance(each, Quantized)}


def same_shapes(model: LanguageModel, family: str, names: str) -> None:
    """The names alone give the shapes and types."""
    shapes = jax.eval_shape(lambda: nnx.state(abstract(config(family), parse(names))))
    of = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)  # noqa: E731
    assert jax.tree.leaves(of(nnx.state(model))) == jax.tree.leaves(of(shapes))


@pytest.mark.parametrize("family", ["transformer", pytest.param("rwkv", marks=pytest.mark.slow)])
def test_q4_k_m_chooses_by_name(family):
    """Of 64 inputs the six bits become eight and the four five; what a recipe is for may be narrowed."""
    (step,) = compress(model_of(family), parse("q4_k_m"))
    kinds = held(step.model)
    assert kinds.keys() == set(step.changed)
    assert {name: kind == "q8_0" for name, kind in kinds.items()} == {
        name: re.search(MORE, name) is not None for name in kinds
    }
    assert set(kinds.values()) == {"q8_0", "q5_0"}
    assert "embedding.weight" in kinds
    names = "+".join(map(str, step.rules))
    assert len(step.rules) == 2
    same_shapes(step.model, family, names)
    (narrow,) = compress(model_of(family), parse("q4_k_m@mixer"))
    assert held(narrow.model) == {name: kind for name, kind in kinds.items() if "mixer" in name}
    assert "is not for it" in narrow.left["embedding.weight"]


def total(choices: dict[str, list[Choice]], i: int, levels: dict[str, int]) -> float:
    return sum(choices[name][level][i] for name, level in levels.items())


def test_spending_is_greedy_and_within_the_budget():
    """Each step of it against all others that were possible; never worse than one candidate for all."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes, scale = rng.integers(100, 1000, 5), rng.exponential(size=5)
        given = {
            f"w{i}": [Choice(int(size * bits), s * 4.0**-bits * rng.uniform(0.5, 1.5)) for bits in (2, 3, 4, 8)]
            for i, (size, s) in enumerate(zip(sizes, scale, strict=True))
        }
        limit = 4.0 * sizes.sum()
        chosen = spend(given, limit)
        cost, error = (functools.partial(total, given, i) for i in (0, 1))
        assert cost(chosen) <= limit
        for name, level in chosen.items():  # nothing better fits
            for k in range(level + 1, 4):
                other = chosen | {name: k}
                assert cost(other) > limit or error(other) >= error(chosen)
        best = min(
            error(levels)
            for picks in itertools.product(range(4), repeat=5)
            if cost(levels := dict(zip(given, picks, strict=True))) <= limit
        )
        assert error(chosen) <= error(dict.fromkeys(given, 2))
        assert error(chosen) < 2 * best
    assert spend({"a": [Choice(1, 2.0), Choice(2, 3.0)]}, 10) == {"a": 0}  # what is no better is not bought


def test_errors_are_those_of_the_outputs():
    """tr(ΔWᵀ H ΔW) / tr(Wᵀ H W) of each layer, in float64; of a table H = 1, and where the text tells nothing."""
    model = model_of("mamba")
    found = moments(model, text())
    matrix, table = (next(p for p in places(model) if p.kind == kind) for kind in ("matrix", "table"))
    for place, given in (
        (matrix, found),
        (matrix, Moments(dict.fromkeys(found, jnp.zeros_like(found[matrix.path])))),
        (table, Moments()),
    ):
        W = np.asarray(place.value[...], np.float64)
        W = W.T[None] if place.kind == "table" else W
        H = np.broadcast_to(np.eye(W.shape[-2]), (len(W), W.shape[-2], W.shape[-2]))
        if place.path in given and np.any(given[place.path]):
            H = np.asarray(given[place.path], np.float64)
        of = choices(place, given)
        for recipe, choice in zip(CANDIDATES[1:], of[1:], strict=True):
            expected, nbytes = 0.0, 0
            for w, h in zip(W, H, strict=True):
                made = rounded(jnp.asarray(w, jnp.float32), recipe, None)
                error = np.asarray(made.materialize(), np.float64) - w
                expected += np.trace(error.T @ h @ error) / np.trace(w.T @ h @ w)
                nbytes += made.nbytes
            assert choice.error == pytest.approx(expected, rel=1e-3)
            assert choice.nbytes == nbytes


def test_a_budget_is_kept_and_becomes_plain_recipes():
    model = model_of("mamba")
    bits = {}
    for budget in ("budget-4", "budget-6"):
        (step,) = compress(model, parse(budget), lambda model, measure: measure(model, text()))
        held = [each for each in weights(step.model).values() if isinstance(each, Quantized)]
        size = sum(np.prod(each.shape) for each in held)
        bits[budget] = 8 * sum(each.nbytes for each in held) / size
        assert bits[budget] <= float(budget.removeprefix("budget-"))
        assert not any("budget" in str(rule) for rule in step.rules)
        same_shapes(step.model, "mamba", "+".join(map(str, step.rules)))
    assert bits["budget-4"] < bits["budget-6"]
    with pytest.raises(UserError, match=r"budget-2: no less than .* bits a weight are possible; nearest: budget-3"):
        abstract(config("mamba"), parse("budget-2"))
