"""Learned beginnings on the five families: what a document, a prompt and a method that reads text know of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.compression.calibrate import moments
from phyla.compression.compress import compress
from phyla.compression.depth import influence
from phyla.compression.recipes import parse
from phyla.models.errors import UserError
from phyla.models.weights import trainable
from phyla.training.generate import generate
from phyla.training.respond import GREEDY
from phyla.training.step import split
from tests.compression.test_adapters import (
    FAMILIES,
    NOT,
    TOKENS,
    UNMOVED,
    VOCABULARY,
    adapted,
    built,
    disturbed,
    leaves,
)

PACKED = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2, 1, 0]])
DOCUMENTS = ((0, 0, 4), (0, 4, 9), (1, 2, 5), (1, 5, 7), (1, 7, 8))
"""Their rows in PACKED, and where they begin and end."""
BEGINNINGS = ("state", "prefix-3", "prompt-3", "ptuning-3")
FIRST = [("transformer", "prefix-3"), ("rwkv", "state")]
REST = [(family, name) for family in FAMILIES for name in BEGINNINGS if (family, name) not in (*FIRST, *NOT)]


@pytest.mark.parametrize(("family", "name"), [*FIRST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_every_packed_document_has_the_beginning_that_it_has_alone(family, name):
    """Hidden vectors, all layers and every gradient; padding is nothing to it."""
    model = disturbed(nnx.clone(adapted(family, name).model), trainable)
    graphdef, params, frozen = split(model)
    some = jax.random.normal(jax.random.key(1), (*TOKENS.shape, model.config.width))
    tokens, weights = np.zeros((5, 5), np.int32), np.zeros((5, 5, model.config.width), np.float32)
    for i, (row, begin, end) in enumerate(DOCUMENTS):
        tokens[i, : end - begin], weights[i, : end - begin] = TOKENS[row, begin:end], some[row, begin:end]

    @jax.jit
    def both(params, tokens, segment_ids, weights):
        def loss(params):
            found = nnx.merge(graphdef, params, frozen).forward(tokens, segment_ids=segment_ids, layers=True)
            return jnp.sum(found.hidden * weights), found

        return jax.grad(loss, has_aux=True)(params)

    gradient, packed = both(params, TOKENS, PACKED, some * (PACKED != 0)[..., None])
    own_gradient, alone = both(params, tokens, None, weights)
    for i, (row, begin, end) in enumerate(DOCUMENTS):
        np.testing.assert_allclose(packed.hidden[row, begin:end], alone.hidden[i, : end - begin], atol=2e-5)
        np.testing.assert_allclose(packed.layers[:, row, begin:end], alone.layers[:, i, : end - begin], atol=2e-5)
    assert not packed.hidden[PACKED == 0].any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), gradient, own_gradient)
    still = [each for each, leaf in leaves(gradient).items() if not leaf.any()]
    assert not [each for each in still if not any(known in each for known in UNMOVED)], still
    assert all((each.tokens == np.count_nonzero(PACKED)).all() for each in packed.routing)


def test_a_beginning_is_what_is_read_before():
    """A prompt of real tokens' embeddings is the text before the text; a state goes on with one document."""
    model = compress(built("jamba"), parse("prompt-3"))[-1].model
    prompt = jax.random.randint(jax.random.key(3), (3,), 0, VOCABULARY)
    model.beginning.vectors[...] = built("jamba").embedding(prompt)
    whole = jnp.concatenate([jnp.broadcast_to(prompt, (2, 3)), TOKENS], axis=1)

    @nnx.jit
    def hidden(model, tokens):
        return model(tokens)[0]

    found = hidden(model, TOKENS)
    np.testing.assert_allclose(found, hidden(built("jamba"), whole)[:, 3:], atol=1e-4)

    @nnx.jit
    def by_one(model, tokens):
        state = model.initial_state(2, tokens.shape[1])
        first, state = model(tokens[:, :4], state)
        return jnp.concatenate([first, model(tokens[:, 4:], state)[0]], axis=1)

    np.testing.assert_allclose(by_one(model, TOKENS), found, atol=1e-4)
    with pytest.raises(UserError, match="goes on with one document: leave segment_ids out"):
        jax.eval_shape(lambda: model(TOKENS, model.initial_state(2, 9), PACKED))


@pytest.mark.parametrize(
    ("family", "name"), [("transformer", "prefix-3"), pytest.param("rwkv", "state", marks=pytest.mark.slow)]
)
def test_prompts_of_any_length_go_on_as_each_alone(family, name):
    model = disturbed(nnx.clone(adapted(family, name).model), trainable)
    graphdef, params = nnx.split(model)
    prompts = [np.asarray(TOKENS[0, :n]) for n in (5, 2, 5)] + [np.asarray(TOKENS[1, :3])]
    options: dict[str, Any] = {"max_tokens": 6, "sampling": GREEDY}
    asked = []

    def finished(row: int, tokens: np.ndarray) -> bool:
        asked.append(row)
        return False

    together = generate(graphdef, params, prompts, finished=finished, width=9, **options)
    assert asked == [1, 3, 0]  # the first of each length, by its own number

    @jax.jit
    def logits_of(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens)[0])

    for prompt, found in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            whole = np.pad(np.asarray(tokens), (0, 11 - len(tokens)))[None]
            tokens.append(int(jnp.argmax(logits_of(params, whole)[0, len(tokens) - 1])))
        assert tokens[len(prompt) :] == found.tolist()


@pytest.mark.slow
def test_calibration_reads_each_token_once():
    """A beginning, read before every document, is left out of the figures, also of those of whole blocks."""
    model, batches = adapted("transformer", "prompt-3").model, [(TOKENS, PACKED)]
    found, right = (moments(each, batches, squares=False).columns for each in (model, built("transformer")))
    jax.tree.map(np.testing.assert_array_equal, found, right)
    jax.tree.map(np.testing.assert_array_equal, *(influence(each, batches) for each in (model, built("transformer"))))
    assert model.beginning is not None
