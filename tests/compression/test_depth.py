"""Layers taken out or tied: which, what is left, and that it computes what it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.compression.compress import abstract, compress
from phyla.compression.depth import influence
from phyla.compression.matrices import places
from phyla.compression.recipes import parse
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import MLPConfig
from tests.compression.test_structure import HYBRID, MODELS, TOKENS, built, hybrid, logits, model, text_of


@pytest.mark.parametrize(
    "name", [name if name == "transformer" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_repeat_that_changes_nothing_is_taken_out(name):
    made = nnx.clone(built(name))
    for place in places(made):
        if place.path[0] == "periods" and place.path[3] in ("mixer", "channel"):
            place.value[...] = place.value[...].at[0].set(0)
    (step,) = compress(made, parse("prune-layers-50%"))
    before = logits(made)
    np.testing.assert_allclose(logits(step.model), before, atol=1e-5 * np.abs(before).max())
    assert step.model.config.repeats == 1
    (text,) = compress(made, parse("prune-layers-50%-text"), text_of(made))
    for one, other in zip(jax.tree.leaves(text.model), jax.tree.leaves(step.model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_block_of_a_pattern_that_does_not_repeat():
    made = nnx.clone(hybrid())
    for place in places(made):
        if place.path[:3] == ("periods", "blocks", 1) and place.path[3] == "mixer":
            place.value[...] = jnp.zeros_like(place.value[...])
    (step,) = compress(made, parse("prune-layers-1"))
    assert step.model.config.pattern == (HYBRID.pattern[0], HYBRID.pattern[2])
    assert abstract(HYBRID, parse("prune-layers-1")).config.layers == 2  # which ones is not known of shapes
    np.testing.assert_allclose(logits(step.model), logits(made), atol=1e-5)


def test_influence_is_one_minus_the_cosine():
    """Of each block's input and output, block by block through the same modules."""
    made = built("transformer")
    found = influence(made, [(TOKENS, jnp.ones_like(TOKENS))] * 2)
    x = np.asarray(made.embedding(TOKENS))
    for repeat in range(2):
        period = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], made.periods)
        for i, block in enumerate(period.blocks):
            y = np.asarray(block(jnp.asarray(x), None, None, None)[0])
            cosine = np.sum(x * y, -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            np.testing.assert_allclose(found["periods", "blocks", i][repeat], 2 * np.sum(1 - cosine), rtol=1e-4)
            x = y


def test_tied_layers():
    """Repeats that are alike already stay what they are; others become their mean."""
    config = model((MambaConfig(state=4), MLPConfig()), repeats=4)
    made = LanguageModel(config, nnx.Rngs(0))
    original = {place.name: np.asarray(place.value[...]) for place in places(made)}
    (step,) = compress(made, parse("tie-layers-2"))
    assert step.model.config == dataclasses.replace(config, groups=2)
    for place in places(step.model):
        expected = original[place.name]
        if place.path[0] == "periods":
            expected = (expected[::2] + expected[1::2]) / 2
        np.testing.assert_allclose(place.value[...], expected, atol=1e-7)
    for place in places(made):
        if place.path[0] == "periods":
            place.value[...] = place.value[...][jnp.array([0, 0, 2, 2])]
    (tied,) = compress(made, parse("tie-layers-2"))
    np.testing.assert_allclose(logits(tied.model), logits(made), atol=1e-6)
    (fewer,) = compress(tied.model, parse("prune-layers-50%"))  # of four, two that share
    assert (fewer.model.config.layers, fewer.model.config.groups) == (2, 1)
