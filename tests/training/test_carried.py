"""A run whose state has 8 bits between calls: what is reported of it, that it speaks, and that it is trained on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.compression.compress import compress
from phyla.compression.recipes import parse
from phyla.compression.state import is_held
from phyla.training.compress import compress_run
from phyla.training.data.pipeline import prepare
from phyla.training.generate import Sampling, generate
from phyla.training.saved import load
from phyla.training.speed import state_bytes


@pytest.fixture(scope="module")
def held(trained, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("held") / "out"
    return out, compress_run(trained, parse("int8+state-int8"), out)


def test_the_figures_are_those_of_plain_computations(held):
    out, record = held
    first, middle, last = record["steps"]
    after = load(out)
    assert is_held(after.model())
    # 2 heads of 8, keys and values; 32 channels of 4 states.
    saved_bytes = 3 * (2 * 1024 * 16 + 32 * 4) - 4 * (2 * 1024 * 2 + 32)
    assert first["state_bytes"] - last["state_bytes"] == saved_bytes
    assert last["state_bytes"] == state_bytes(after.model(), 1024)
    assert "carried_1" not in middle
    # A state of floats loses nothing; the loss of one of codes, token by token.
    assert first["carried_1"] == pytest.approx(first["bits_per_byte"], rel=1e-5)
    assert first["carried_64"] == pytest.approx(first["bits_per_byte"], rel=1e-5)
    model = after.model()
    packed = prepare(after.experiment.data, after.tokenizer, "validation")
    tokens, segments = jnp.asarray(packed.tokens), jnp.asarray(packed.segment_ids)
    step = jax.jit(lambda token, state, segment: model(token, state, segment))
    state, hidden = model.initial_state(len(tokens), tokens.shape[1]), []
    for t in range(tokens.shape[1] - 1):
        out_, state = step(tokens[:, t : t + 1], state, segments[:, t : t + 1])
        hidden.append(out_)
    said = np.asarray(jax.nn.log_softmax(model.logits(jnp.concatenate(hidden, axis=1))), np.float64)
    asked = np.asarray((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0))
    nats = -np.take_along_axis(said, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0][asked]
    assert last["carried_1"] == pytest.approx(nats.sum() / np.log(2) / packed.num_bytes, rel=1e-5)
    assert last["carried_1"] == pytest.approx(first["carried_1"], rel=0.01)
    assert last["carried_kl"] > 0
    assert "8 bits between calls: periods.blocks.0.mixer.k, " in record["notes"][0]


def test_it_speaks_as_it_reads_and_is_compressed_again(trained, held):
    """Prefill in one call and in chunks, then greedy decoding; left padding beside a longer prompt."""
    saved = load(held[0])
    prompts = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"the quick brown", b"the quick")]
    options: dict[str, Any] = {"max_tokens": 8, "sampling": Sampling(temperature=0)}
    both = generate(saved.graphdef, saved.params, prompts, **options)
    (alone,) = generate(saved.graphdef, saved.params, prompts[1:], **options)
    np.testing.assert_array_equal(both[1], alone)
    model, tokens = saved.model(), jnp.asarray(prompts[1])[None]
    state = model.initial_state(1, 32)
    for chunk in (tokens[:, :4], tokens[:, 4:]):
        hidden, state = model(chunk, state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"int8", "int32", "float32"}
    assert int(model.logits(hidden)[0, -1].argmax()) == alone[0]
    again = compress(load(trained).model(), parse("state-int8+int8"))[-1].model
    for one, other in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(saved.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_learned_beginning_is_held_once_it_is_made(trained):
    """Its numbers are floats in training; a call begins with their codes."""
    model = compress(load(trained).model(), parse("state-int8+prefix-3"))[-1].model
    assert model.beginning is not None
    tokens = jnp.asarray([[5, 6, 7, 8]])
    whole = model(tokens)[0]
    carried, state = model(tokens, model.initial_state(1, 4))
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(state))
    assert 0 < np.abs(whole - carried).max() < 0.05 * np.abs(whole).max()
    learned = nnx.state(model.beginning, nnx.Param)
    gradient = jax.grad(lambda p: jnp.sum(nnx.merge(*_with(model, p))(tokens)[0][..., 0]))(learned)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def _with(model, learned):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.merge_state(state, nnx.State({"beginning": learned}))
