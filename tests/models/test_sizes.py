"""Counting, operations, the width for a budget; configurations to JSON and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.serialization import from_json, to_json

ATTENTION = BlockConfig(mixer=AttentionConfig(heads=4, head_dim=8), channel=GatedMLPConfig())
MAMBA = BlockConfig(mixer=MambaConfig())


def test_the_count_is_that_of_the_formula_and_of_the_arrays(architecture):
    arrays = jax.tree.leaves(nnx.state(LanguageModel(architecture, nnx.Rngs(0))))
    assert sizes.count(architecture) == sum(leaf.size for leaf in arrays)


def test_counts_by_hand():
    V, d, L = 50, 16, 3
    config = ModelConfig(width=d, layers=L, vocab_size=V, pattern=(ATTENTION,))
    assert sizes.count(config) == V * d + L * (4 * d * 32 + 3 * d * round(8 / 3 * d) + 2 * d) + d
    inner, N, rank = 2 * d, 16, 1
    mamba = d * 2 * inner + 4 * inner + inner + inner * (rank + 2 * N) + rank * inner + inner + inner * N + inner
    config = ModelConfig(width=d, layers=L, vocab_size=V, pattern=(MAMBA,), tie_embeddings=False)
    assert sizes.count(config) == 2 * V * d + L * (mamba + inner * d + d) + d


def test_mamba_130m_has_its_published_size():
    """129,135,360: state-spaces/mamba-130m, with its vocabulary of 50,277 padded to 50,280."""
    config = ModelConfig(width=768, layers=24, vocab_size=50_280, pattern=(MAMBA,))
    assert sizes.count(config) == 129_135_360


def test_operations_by_hand():
    V, d, L, T = 50, 16, 3, 64
    config = ModelConfig(width=d, layers=L, vocab_size=V, pattern=(ATTENTION,))
    matrices = V * d + L * (4 * d * 32 + 3 * d * round(8 / 3 * d))
    # Causal: on average half of the T keys, two products each for scores and values, 32 = heads × head_dim.
    assert sizes.flops_per_token(config, T) == 2 * matrices + L * 4 * 32 * T / 2

    # Untied, the table is only looked up and the head multiplies. A channel has 2 for each of 4 taps, 7 for each state.
    inner, N, rank = 2 * d, 16, 1
    matrices = V * d + L * (d * 2 * inner + inner * (rank + 2 * N) + rank * inner + inner * d)
    config = ModelConfig(width=d, layers=L, vocab_size=V, pattern=(MAMBA,), tie_embeddings=False)
    assert sizes.flops_per_token(config, T) == 2 * matrices + L * inner * (2 * 4 + 7 * N)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (16, True), (100, True), (None, False)])
def test_attention_counts_the_keys_that_a_token_sees(window, causal):
    T = 64
    # Half of a token's own key, so that the mean over a whole causal sequence is T / 2.
    seen = [min(t + 0.5, window or T) for t in range(T)] if causal else [T]
    config = AttentionConfig(heads=4, head_dim=8, window=window, causal=causal)
    model = ModelConfig(width=16, layers=1, pattern=(ATTENTION,))
    assert config.flops_per_token(model, T) == 4 * 32 * sum(seen) / len(seen)


def test_sparse_attention_counts_what_is_seen_beyond_the_window():
    """On average: every fourth of the tokens beyond the window, and two of all from outside it."""
    T, window = 64, 16
    config = AttentionConfig(heads=4, head_dim=8, window=window, stride=4, global_tokens=2)
    beyond = [max(0, t + 0.5 - window) / 4 + 2 * (t >= window) for t in range(T)]
    seen = [min(t + 0.5, window) + more for t, more in zip(range(T), beyond, strict=True)]
    model = ModelConfig(width=16, layers=1, pattern=(ATTENTION,))
    assert config.flops_per_token(model, T) == pytest.approx(4 * 32 * sum(seen) / T)


@settings(max_examples=6, deadline=None)
@given(
    budget=st.integers(300_000, 30_000_000),
    layers=st.sampled_from([2, 4]),
    block=st.sampled_from([ATTENTION, MAMBA]),
    tied=st.booleans(),
)
def test_the_width_meets_the_budget(budget, layers, block, tied):
    config = ModelConfig(width=8, layers=layers, vocab_size=257, pattern=(block,), tie_embeddings=tied)
    found = sizes.fit_width(config, budget)
    assert abs(sizes.count(found) / budget - 1) <= 0.01
    assert dataclasses.replace(found, width=8) == config


def test_the_width_is_as_round_as_the_budget_allows():
    config = ModelConfig(width=8, layers=2, vocab_size=257, pattern=(MAMBA,))
    budget = sizes.count(dataclasses.replace(config, width=192))
    assert sizes.fit_width(config, budget).width == 192
    heads = BlockConfig(mixer=AttentionConfig(heads=6), channel=MLPConfig())
    config = ModelConfig(width=12, layers=2, vocab_size=257, pattern=(heads,))
    assert sizes.fit_width(config, sizes.count(dataclasses.replace(config, width=132))).width == 132


def test_where_heads_leave_no_width_the_channel_mixers_make_up_the_rest():
    heads = BlockConfig(mixer=AttentionConfig(heads=8), channel=MLPConfig())  # widths of 16, 32, …
    config = ModelConfig(width=16, layers=3, vocab_size=257, prefix=(heads,), pattern=(heads,))
    between = (
        sizes.count(dataclasses.replace(config, width=64)) + sizes.count(dataclasses.replace(config, width=80))
    ) // 2
    found = sizes.fit_width(config, between)
    assert found.width in (64, 80)
    assert abs(sizes.count(found) / between - 1) <= 0.01
    assert found.prefix == found.pattern != config.pattern


def test_a_budget_that_no_width_meets_is_refused():
    heads = BlockConfig(mixer=AttentionConfig(heads=64))  # widths of 128, 256, …; no channel mixer to make up
    config = ModelConfig(width=128, layers=2, vocab_size=257, pattern=(heads,))
    between = (sizes.count(config) + sizes.count(dataclasses.replace(config, width=256))) // 2
    with pytest.raises(UserError, match=r"no model\.width gives .* nearest: "):
        sizes.fit_width(config, between)


def test_configurations_survive_json(architecture):
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(architecture)))) == architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, "no field in config 'widht'; nearest: width"),
        ({"pattern": None}, None),
        (
            {"pattern": [{"channel": None, "mixer": {"layer": "mamva"}}]},
            "no layer at config.pattern.0.mixer 'mamva'; nearest: mamba",
        ),
    ],
)
def test_a_configuration_of_another_version_is_refused(change, message):
    data = to_json(ModelConfig(pattern=(MAMBA,)))
    if message is None:
        del data["pattern"]
        message, change = "config has no field 'pattern'", {}
    with pytest.raises(UserError, match=message):
        from_json(ModelConfig, data | change)


def test_a_field_that_did_not_exist_yet_has_its_default():
    config = ModelConfig(pattern=(MAMBA,), width=64)
    data = to_json(config)
    del data["embedding_init"]
    assert from_json(ModelConfig, data) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, r"model\.width must be at least 1, not 0"),
        ({"layers": 3}, r"model\.layers must be a multiple of the pattern's length 2, not 3; nearest: (2|4)"),
        ({"pattern": ()}, r"model\.pattern must have at least one block"),
        ({"vocab_size": 0}, r"model\.vocab_size must be at least 1"),
        ({"learned_positions": -1}, r"model\.learned_positions must be at least 0"),
    ],
)
def test_impossible_values_name_the_field(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**{"width": 8, "layers": 4, "pattern": (MAMBA, ATTENTION)} | change)


def test_more_tokens_than_learned_positions_are_refused():
    config = ModelConfig(width=8, layers=1, vocab_size=9, pattern=(MAMBA,), learned_positions=4)
    with pytest.raises(UserError, match=r"5 tokens do not fit model\.learned_positions 4"):
        LanguageModel(config, nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32))
