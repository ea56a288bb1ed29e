"""Generation: what is drawn is what the model says, whatever else is in the batch."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phyla.models.errors import UserError
from phyla.training.generate import BLOCK, Sampling, generate, generate_run, sample, until_end
from phyla.training.loop import train
from phyla.training.saved import load

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(experiment, setup) -> tuple[Any, Any]:
    """A model with opinions: its logits are well apart."""
    _, state, graphdef, _ = setup(experiment)
    return graphdef, jax.tree.map(lambda p: 3 * p, state.params)


def by_full_forward(graphdef, params, prompt, count):
    """One token at a time, each from the whole text before it."""
    model, tokens = nnx.merge(graphdef, params), list(prompt)
    for _ in range(count):
        tokens.append(int(jnp.argmax(model.logits(model(jnp.asarray([tokens]))[0][0, -1]))))
    return tokens[len(prompt) :]


def test_greedy_decoding_equals_the_whole_forward_for_prompts_of_any_length(model):
    graphdef, params = model
    prompts = [np.asarray(p, np.int32) for p in ([1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11])]
    together = generate(graphdef, params, prompts, max_tokens=6, sampling=GREEDY)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tokens.tolist() == by_full_forward(graphdef, params, prompt, 6)


def test_more_tokens_than_a_block_and_the_same_again(model):
    graphdef, params = model
    prompt = [np.asarray([1, 2, 3], np.int32)]
    hot = Sampling(temperature=1.0)
    long = generate(graphdef, params, prompt, max_tokens=BLOCK + 5, sampling=hot, seed=3)[0]
    assert len(long) == BLOCK + 5
    assert (
        long[:BLOCK].tolist() == generate(graphdef, params, prompt, max_tokens=BLOCK, sampling=hot, seed=3)[0].tolist()
    )
    assert long.tolist() != generate(graphdef, params, prompt, max_tokens=BLOCK + 5, sampling=hot, seed=4)[0].tolist()


def test_every_token_and_row_is_a_draw_of_its_own(model):
    graphdef, params = model
    fair = jax.tree.map(jnp.zeros_like, params)  # every token is as likely
    rows = generate(graphdef, fair, [np.asarray([1], np.int32)] * 4, max_tokens=BLOCK, sampling=Sampling())
    drawn = np.stack(rows)
    assert len(np.unique(drawn)) > 20  # of 31
    for t in range(BLOCK):
        assert len(np.unique(drawn[:, t])) > 1
    assert (np.diff(drawn, axis=1) == 0).mean() < 0.15  # one in 31


def test_a_document_ends_before_its_first_end():
    assert until_end(np.asarray([5, 9, 7, 9]), 9).tolist() == [5]
    assert until_end(np.asarray([5, 7]), 9).tolist() == [5, 7]


def test_decoding_ends_when_every_row_is_finished(model):
    graphdef, params = model
    asked = []

    def finished(row, tokens):
        asked.append(len(tokens))
        return len(tokens) > 0

    tokens = generate(
        graphdef, params, [np.asarray([1], np.int32)] * 2, max_tokens=10 * BLOCK, sampling=GREEDY, finished=finished
    )
    assert [len(t) for t in tokens] == [BLOCK, BLOCK]


def allowed(logits, sampling):
    """The tokens that may be drawn, in float64 and one by one."""
    p = np.exp(np.asarray(logits, np.float64) / sampling.temperature)
    keep = np.ones(len(p), bool)
    if sampling.top_k is not None:
        keep &= p >= np.sort(p)[::-1][min(sampling.top_k, len(p)) - 1]
    if sampling.top_p is not None:
        order = np.argsort(-p * keep)
        mass = np.cumsum((p * keep)[order]) / (p * keep).sum()
        last = np.searchsorted(mass, sampling.top_p - 1e-9)
        keep &= p >= p[order[min(last, len(p) - 1)]]
    if sampling.min_p is not None:
        keep &= p >= sampling.min_p * p[keep].max() - 1e-12
    return keep, p * keep / (p * keep).sum()


@example(seed=0, sampling=Sampling(min_p=0.3))
@example(seed=1, sampling=Sampling(min_p=1.0))
@example(seed=2, sampling=Sampling(top_k=3, top_p=0.7, min_p=0.2))
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.3, 3),
        top_k=st.none() | st.integers(1, 12),
        top_p=st.none() | st.floats(0.05, 1),
        min_p=st.none() | st.floats(0.01, 1),
    ),
)
def test_the_filters_keep_the_right_tokens_at_the_right_odds(seed, sampling):
    logits = np.random.default_rng(seed).standard_normal(8).astype(np.float32) * 2
    keep, odds = allowed(logits, sampling)
    draws = 4000
    drawn = np.asarray(sample(jnp.tile(logits, (draws, 1)), jax.random.key(seed), sampling))
    counts = np.bincount(drawn, minlength=8) / draws
    assert not counts[~keep].any()
    assert np.abs(counts - odds).max() < 5 * 0.5 / math.sqrt(draws)


def test_a_restored_run_continues_prompts_and_writes_them(experiment, tmp_path, capsys):
    run = tmp_path / "run"
    (tmp_path / "documents").mkdir()
    for i in range(40):
        (tmp_path / "documents" / f"{i}.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    data = dataclasses.replace(experiment.data, source=str(tmp_path / "documents" / "*.txt"))
    train(dataclasses.replace(experiment, data=data), run)
    options = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0, "json": None}
    texts = generate_run(run, ["abcdef", "mnop"], max_tokens=12, stop=[], **options)
    printed = capsys.readouterr().out
    record = json.loads((run / "generation.json").read_text())
    assert [entry["text"] for entry in record["texts"]] == texts
    assert all(text in printed for text in texts)

    # What the saved parameters say, token by token.
    saved = load(run)
    prompt = [256, *b"abcdef"]
    expected = bytes(by_full_forward(saved.graphdef, saved.params, prompt, 12)).decode()
    assert texts[0] == expected

    stop = expected[3:5]
    cut = generate_run(run, ["abcdef"], max_tokens=12, stop=["never", expected[8:10], stop], **options)[0]
    assert cut == expected[: expected.index(stop)]

    # A text ends where its document does, or at a stop string; and nothing is drawn for long after.
    drawn = by_full_forward(saved.graphdef, saved.params, [256, *b"uvwx"], 4)
    expected = bytes(drawn[: drawn.index(256)]).decode()
    for stop, text in (([], expected), ([expected[1:2]], expected[:1])):
        capsys.readouterr()
        assert generate_run(run, ["uvwx"], max_tokens=4 * BLOCK, stop=stop, **options) == [text]
        assert f"{4 * BLOCK}/{4 * BLOCK} tokens" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1)]
)
def test_impossible_values_name_the_option(field, value):
    with pytest.raises(UserError, match=field.replace("_", "-")):
        Sampling(**{field: value})
