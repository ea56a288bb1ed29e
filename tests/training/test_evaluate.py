"""Evaluation: every byte and the end predicted once, the same figure for any batch size and on any mesh."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.models.errors import UserError
from phyla.training import sharding
from phyla.training.config import MeshConfig
from phyla.training.data.pipeline import prepare
from phyla.training.data.tokenizers import ByteTokenizer
from phyla.training.evaluate import evaluate_run, make_evaluate, score
from phyla.training.log import read
from phyla.training.loop import train
from phyla.training.saved import load


@pytest.fixture
def run(experiment, tmp_path):
    train(experiment, tmp_path / "run", max_steps=10)
    return tmp_path / "run"


def test_the_figure_is_that_of_a_plain_computation(run, experiment):
    saved = load(run)
    text = (run.parent / "validation.txt").read_bytes()
    tokens = [256, *text, 256]
    total, T = 0.0, experiment.data.sequence_length
    model = saved.model()
    for begin in range(0, len(text) + 1, T):  # each byte and the end once, with the context of their row
        row = jnp.asarray([tokens[begin : begin + T + 1]])
        log_p = jax.nn.log_softmax(model.logits(model(row[:, :-1])[0]))
        total -= float(jnp.take_along_axis(log_p, row[:, 1:, None], -1).sum())
    result = evaluate_run(run)
    assert result.tokens == len(text) + 1
    np.testing.assert_allclose(result.bits_per_byte, total / math.log(2) / len(text), rtol=1e-5)
    np.testing.assert_allclose(result.nats_per_token, total / (len(text) + 1), rtol=1e-5)
    record = json.loads((run / "evaluation.json").read_text())
    assert (record["bits_per_byte"], record["bytes"]) == (result.bits_per_byte, len(text))


def test_batch_size_and_mesh_change_nothing(run, experiment):
    saved = load(run)
    packed = prepare(experiment.data, ByteTokenizer(), "validation")
    sums = make_evaluate(saved.graphdef, saved.objective)
    mesh = sharding.make_mesh(MeshConfig(data=8), 8)
    params = jax.device_put(saved.params, sharding.shardings(saved.params, mesh))
    many = score(sums, params, packed, 8, mesh)
    one = score(sums, saved.params, packed, 3, saved.mesh)
    np.testing.assert_allclose(many.bits_per_byte, one.bits_per_byte, rtol=1e-6)


def test_other_data_and_another_place_for_the_table(run):
    (run.parent / "other.txt").write_text("Something else entirely: 0123456789 " * 5)
    other = evaluate_run(run, data=str(run.parent / "other.txt"), json=run.parent / "table.json")
    assert other.bits_per_byte > evaluate_run(run).bits_per_byte
    assert json.loads((run.parent / "table.json").read_text())["bytes"] == 36 * 5


def test_the_average_is_what_is_evaluated(experiment, tmp_path):
    averaged = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, ema=0.999))
    train(averaged, tmp_path / "ema", max_steps=10)
    train(experiment, tmp_path / "plain", max_steps=10)
    # A slow average has hardly left the initialisation.
    average = evaluate_run(tmp_path / "ema").bits_per_byte
    assert average > evaluate_run(tmp_path / "plain").bits_per_byte + 0.5
    np.testing.assert_allclose(read(tmp_path / "ema")[-1]["validation_bits_per_byte"], average, rtol=1e-5)  # also then


def test_what_is_not_a_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no config.json; there: .*run"):
        evaluate_run(tmp_path / "rum")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluate_run(run)
    (tmp_path / "10").rename(run / "checkpoints" / "10")
    with pytest.raises(UserError, match="nowhere"):
        evaluate_run(run, data="nowhere.txt")
