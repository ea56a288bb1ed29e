"""A run whose state has 8 bits between calls: what is reported of it, that it speaks, and a learned beginning."""

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
from phyla.models.language_model import ModelState
from phyla.training.compress import compress_run
from phyla.training.data.pipeline import prepare
from phyla.training.divergence import divergences
from phyla.training.generate import Sampling, generate
from phyla.training.objectives import next_tokens
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


def test_it_speaks_as_it_reads(held):
    """Left padding beside a longer prompt, and the prompt alone in chunks, then token by token."""
    saved = load(held[0])
    prompts = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"the quick brown", b"the quick")]
    options: dict[str, Any] = {"max_tokens": 8, "sampling": Sampling(temperature=0)}
    expected = generate(saved.graphdef, saved.params, prompts, **options)[1]

    @jax.jit
    def call(params: nnx.State, tokens: jax.Array, state: ModelState) -> tuple[jax.Array, ModelState]:
        model = nnx.merge(saved.graphdef, params)
        hidden, state = model(tokens, state)
        return jnp.argmax(model.logits(hidden[:, -1]), axis=-1), state

    state, token = saved.model().initial_state(1, 32), jnp.zeros((1,), jnp.int32)
    for at in range(0, 9, 3):
        token, state = call(saved.params, jnp.asarray(prompts[1])[None, at : at + 3], state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"int8", "int32", "float32"}
    found = []
    for _ in range(8):
        found.append(int(token[0]))
        token, state = call(saved.params, token[:, None], state)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_learned_beginning_is_held_once_it_is_made(trained):
    """What it is computed from is trained through floats; a call begins with codes."""
    model = compress(load(trained).model(), parse("state-int8+prompt-3"))[-1].model
    graphdef, params = nnx.split(model)
    tokens = jnp.asarray([[5, 6, 7, 8]])

    @jax.jit
    def both(params: nnx.State) -> tuple:
        def whole(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            hidden = nnx.merge(graphdef, params)(tokens)[0]
            return jnp.sum(hidden[..., 0]), hidden

        (_, hidden), gradient = jax.value_and_grad(whole, has_aux=True)(params)
        model = nnx.merge(graphdef, params)
        return hidden, gradient, *model(tokens, model.initial_state(1, 4))

    hidden, gradient, carried, state = both(params)
    assert any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(state))
    assert 0 < np.abs(hidden - carried).max() < 0.05 * np.abs(hidden).max()
    assert (np.abs(gradient["beginning"]["vectors"][...]).max(axis=-1) > 0).all()


@pytest.mark.slow
def test_documents_read_in_calls_have_their_beginning_too(trained):
    saved = load(trained)
    model = compress(saved.model(), parse("prompt-3"))[-1].model
    packed = prepare(saved.experiment.data, saved.tokenizer, "validation")
    options: dict[str, Any] = {"batch_size": 4, "chunk": 64, "mesh": saved.mesh}
    ((whole,), (carried,)) = (divergences([model], next_tokens, packed, **options, call=call) for call in (None, 5))
    assert carried.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-5)
