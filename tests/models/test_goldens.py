"""Logits that other implementations computed: of the repository, and of a folder beside it where there is one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from phyla.models.formats import FORMATS, open_source
from phyla.models.formats.source import build

PLACES = (Path(__file__).parents[1] / "goldens", Path(__file__).parents[3] / "shared" / "goldens")
FOLDERS = [config.parent for place in PLACES for config in sorted(place.glob("*/config.json"))]
FOLDERS = [folder for folder in FOLDERS if json.loads((folder / "config.json").read_text())["model_type"] in FORMATS]
DECODERS = [folder for folder in FOLDERS if "generated" in load_file(folder / "io.safetensors")]
TOLERANCE = 2e-4


def name(folder):
    return f"{folder.parents[1].name}-{folder.name}"


@pytest.fixture(scope="module")
def golden(request):
    """A model with the other implementation's weights, and what that implementation computed."""
    source = open_source(request.param)
    return nnx.merge(*build(source)), load_file(request.param / "io.safetensors")


@jax.jit
def hidden_and_logits(model, tokens, state=None, segment_ids=None):
    hidden, state = model(tokens, state, segment_ids)
    return hidden, model.logits(hidden), state


def logits(*arguments):
    return hidden_and_logits(*arguments)[1:]


@pytest.mark.parametrize("golden", FOLDERS, ids=name, indirect=True)
def test_outputs_equal_the_other_implementations(golden):
    model, io = golden
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    mask = io.get("attention_mask")
    hidden, found, _ = hidden_and_logits(model, tokens, None, None if mask is None else jnp.asarray(mask, jnp.int32))
    if "last_hidden_state" in io:
        seen = np.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        np.testing.assert_allclose(np.asarray(hidden)[seen], io["last_hidden_state"][seen], rtol=0, atol=TOLERANCE)
    else:
        np.testing.assert_allclose(found, io["logits"], rtol=0, atol=TOLERANCE)


def in_pieces(model, tokens, lengths):
    """Logits of the tokens, given so many at a time; every model is compiled for 9 and for 1 (and for the whole)."""
    found, state, at = [], model.initial_state(*tokens.shape), 0
    for length in lengths:
        out, state = logits(model, jnp.asarray(tokens[:, at : at + length], jnp.int32), state)
        found.append(out)
        at += length
    assert at == tokens.shape[1]
    return np.concatenate(found, 1)


@pytest.mark.parametrize("golden", DECODERS, ids=name, indirect=True)
def test_in_chunks(golden):
    model, io = golden
    found = in_pieces(model, io["input_ids"], [9, 9, 9, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found, io["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("golden", DECODERS, ids=name, indirect=True)
def test_step_by_step(golden):
    model, io = golden
    found = in_pieces(model, io["input_ids"], [1] * io["input_ids"].shape[1])
    np.testing.assert_allclose(found, io["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("golden", DECODERS, ids=name, indirect=True)
def test_the_greedy_continuation(golden):
    model, io = golden
    expected, drawn = io["generated"][0, 9:].tolist(), []  # it begins with the prompt
    out, state = logits(model, jnp.asarray(io["input_ids"][:, :9], jnp.int32), model.initial_state(2, 33))
    while len(drawn) < len(expected):
        drawn.append(int(out[0, -1].argmax()))
        out, state = logits(model, jnp.full((2, 1), drawn[-1], jnp.int32), state)
    assert drawn == expected
