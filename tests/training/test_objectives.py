"""The loss: equal to the textbook's, never all logits at once, only real targets counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import MLPConfig
from phyla.models.moe import MoEConfig
from phyla.training.objectives import cross_entropy, masked_token, next_token


def reference(hidden, table, targets):
    """Float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    peak = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    return log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [2, 6, 8, 10_000])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    B, T, D, V = 2, 7, 4, 50
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = 3 * jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)

    def loss(hidden, table):
        return cross_entropy(lambda x: x @ table.T, hidden, targets, chunk=chunk)

    np.testing.assert_allclose(loss(hidden, table), reference(hidden, table, targets), rtol=1e-5, atol=1e-5)

    def total(hidden, table):
        return jnp.sum(jnp.sin(loss(hidden, table)))

    def plain(hidden, table):
        logits = hidden @ table.T
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return jnp.sum(jnp.sin(-chosen))

    for a, b in zip(jax.grad(total, (0, 1))(hidden, table), jax.grad(plain, (0, 1))(hidden, table), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_all_logits_never_exist_at_once(optimised):
    B, T, D, V = 4, 256, 8, 4096
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, D), (V, D))]
    targets = jnp.zeros((B, T), jnp.int32)

    def temporaries(chunk):
        def total(hidden, table):
            return jnp.sum(cross_entropy(lambda x: x @ table.T, hidden, targets, chunk=chunk))

        compiled = jax.jit(jax.grad(total, (0, 1))).lower(*arguments).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    all_logits = 4 * B * T * V
    assert temporaries(B * T) > all_logits  # the measure sees them
    assert temporaries(64) < all_logits / 4


def test_only_targets_inside_a_document_count():
    config = ModelConfig(width=8, layers=1, vocab_size=11, pattern=(BlockConfig(mixer=AttentionConfig(heads=2)),))
    model = LanguageModel(config, nnx.Rngs(0))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 0, 0]])
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    loss = next_token(model, {"tokens": tokens, "segment_ids": segment_ids}, jax.random.key(0), chunk=100)
    assert loss.weight == 3  # 1→2, 2→3 and 4→5; not 3→4, not into padding, not inside it
    separate = 0.0
    for document in ([1, 2, 3], [4, 5]):
        logits = model.logits(model(jnp.asarray([document[:-1]]))[0])
        separate -= jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray([document[1:]])[..., None], -1).sum()
    np.testing.assert_allclose(loss.total, separate, rtol=1e-5)
    assert loss.metrics == {}
    assert loss.penalty == 0


def test_what_experts_add_is_a_penalty_and_no_part_of_the_loss():
    def loss_of(**coefficients):
        channel = MoEConfig(experts=3, top_k=2, **coefficients)
        block = BlockConfig(mixer=AttentionConfig(heads=2), channel=channel)
        model = LanguageModel(ModelConfig(width=8, layers=2, vocab_size=11, pattern=(block,)), nnx.Rngs(0))
        tokens = jnp.asarray([[1, 2, 3, 4, 5, 0, 0], [7, 8, 1, 1, 0, 0, 0]])
        segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
        return next_token(model, {"tokens": tokens, "segment_ids": segment_ids}, jax.random.key(0), chunk=100)

    plain, both = loss_of(balance_loss=0.0, z_loss=0.0), loss_of(balance_loss=0.5, z_loss=0.25)
    assert plain.total == both.total
    assert plain.penalty == 0
    assert plain.metrics == both.metrics  # measured, whatever their coefficients
    means = {name: value / both.weight for name, value in both.metrics.items()}
    # Coefficients times the sum over the two layers.
    expected = 2 * (0.5 * means["balance_loss"] + 0.25 * means["z_loss"])
    np.testing.assert_allclose(both.penalty / both.weight, expected, rtol=1e-6)
    assert 0 <= means["idlest_expert"] <= 1 / 3 <= means["busiest_expert"] <= 1 / 2


ENCODER = ModelConfig(
    width=16,
    layers=2,
    vocab_size=12,
    pattern=(BlockConfig(mixer=AttentionConfig(heads=2, causal=False), channel=MLPConfig()),),
)


def test_masked_tokens_are_hidden_and_only_they_are_predicted():
    """What the model is shown, by the recipe: 15 % chosen, of them 80 % masked, 10 % random, 10 % left."""
    shown = []

    class Recorder(LanguageModel):
        def forward(self, tokens, state=None, segment_ids=None, token_types=None, *, layers=False):
            shown.append(tokens)
            return super().forward(tokens, state, segment_ids, token_types, layers=layers)

    model = Recorder(ENCODER, nnx.Rngs(0))
    tokens = jnp.full((64, 401), 3)
    segment_ids = jnp.where(jnp.arange(401) < 300, 1, 0) * jnp.ones((64, 1), jnp.int32)
    loss = masked_token(model, {"tokens": tokens, "segment_ids": segment_ids}, jax.random.key(0), chunk=64, mask_id=11)
    real, seen = 64 * 300, np.asarray(shown[0])
    assert float(loss.weight) == pytest.approx(0.15 * real, rel=0.03)
    assert (seen[:, 300:] == 3).all()
    assert (seen == 11).sum() == pytest.approx(0.15 * 0.8 * real + 0.15 * 0.1 * real / 12, rel=0.05)
    others = (seen != 3) & (seen != 11)
    assert others.sum() == pytest.approx(0.15 * 0.1 * real * 10 / 12, rel=0.15)
    # The loss is that of token 3 at the chosen places: near ln 12 for a model that knows nothing.
    assert float(loss.total / loss.weight) == pytest.approx(np.log(12), abs=0.5)


def test_an_encoder_learns_the_masked_tokens_and_is_refused_the_next(setup, experiment):
    with pytest.raises(UserError, match="objective must be masked-token"):
        dataclasses.replace(experiment, model=ENCODER)
    masked = dataclasses.replace(experiment, model=ENCODER, objective="masked-token")
    step, state, _, _ = setup(masked)
    # Every token repeats its neighbours: both sides give a hidden one away.
    tokens = jnp.repeat(jax.random.randint(jax.random.key(1), (8, 5), 0, 9), 8, axis=1)[:, :33]
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
