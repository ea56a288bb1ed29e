"""The loss of a model on a whole text, as nats per token and bits per byte."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from phyla.training import run, sharding
from phyla.training.data.chat import chat_format
from phyla.training.data.config import DataConfig
from phyla.training.data.conversations import split_last
from phyla.training.data.pipeline import Packed, prepare
from phyla.training.data.sources import conversations
from phyla.training.objectives import Batch, Objective
from phyla.training.progress import Reporter
from phyla.training.respond import respond
from phyla.training.saved import Saved, load

EXACT_TOKENS = 16
"""Responses of up to so many tokens are compared word for word."""


class Score(NamedTuple):
    """Of a model on a text."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    seconds: float


def make_evaluate(graphdef: nnx.GraphDef, objective: Objective) -> Callable[[nnx.State, Batch], tuple]:
    """A compiled (params, batch) -> (loss sum, weight sum)."""

    @jax.jit
    def sums(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return objective(nnx.merge(graphdef, params), batch, jax.random.key(0))[:2]

    return sums


def score(
    sums: Callable[[nnx.State, Batch], tuple],
    params: nnx.State,
    packed: Packed,
    batch_size: int,
    mesh: Mesh,
    progress: Callable[[int], None] = lambda done: None,
) -> Score:
    """Every row of a packed text, each token predicted once.

    Args:
        sums: from `make_evaluate`.
        params: the model's parameters.
        packed: the text.
        batch_size: sequences at a time, over all processes.
        mesh: where they go.
        progress: called with the number of batches done.
    """
    begin = time.perf_counter()
    batches = packed.batches(batch_size, jax.process_index(), jax.process_count())
    totals = []
    for i, batch in enumerate(batches):
        with jax.set_mesh(mesh):
            totals.append(sums(params, sharding.put_batch(batch, mesh)))
        if i:
            jax.block_until_ready(totals[i - 1])  # at most two batches in flight
        progress(i + 1)
    loss, weight = np.asarray(jax.device_get(totals), np.float64).sum(axis=0)
    nats = float(loss / weight)  # of every token, or of those that were hidden
    return Score(bits_per_byte(nats, packed), nats, packed.num_tokens, time.perf_counter() - begin)


def bits_per_byte(nats_per_token: float, packed: Packed) -> float:
    """Of a loss on a packed text."""
    return nats_per_token * packed.num_tokens / math.log(2) / packed.num_bytes


class ExactMatch(NamedTuple):
    """How many of the short last responses of conversations greedy decoding gives word for word."""

    right: int
    asked: int


def exact_match(saved: Saved, data: DataConfig, max_tokens: int) -> ExactMatch:
    """Of the responses of at most `max_tokens` tokens, their end included, that end a validation conversation."""
    assert data.template is not None
    chat = chat_format(data.template, saved.tokenizer)
    short = [
        (chat.prompt(before), response)
        for before, response in split_last(conversations(data, "validation"))
        if len(saved.tokenizer.encode(response)) < max_tokens
    ]
    short = [(prompt, response) for prompt, response in short if len(prompt) <= data.sequence_length]
    prompts = [prompt for prompt, _ in short]
    with Reporter() as reporter, reporter.task("exact match", len(short), "responses") as task:
        found = respond(saved, prompts, end_id=chat.end_id, max_tokens=max_tokens, progress=task.update)
    right = sum(
        ended and text.strip() == response.strip() for (text, ended), (_, response) in zip(found, short, strict=True)
    )
    return ExactMatch(right, len(short))


def evaluate_run(
    folder: Path, *, data: str | None = None, exact_tokens: int = EXACT_TOKENS, json: Path | None = None
) -> Score:
    """Evaluates a run's last checkpoint on its validation text or on `data`; prints a table and writes it as JSON.

    Of conversations this is the loss of the responses, and also their exact matches where they have at most
    `exact_tokens` tokens (0: none are decoded).

    Raises UserError if the folder is not a run or has no checkpoint, or if the data cannot be read.
    """
    saved: Saved = load(folder)
    config = saved.experiment.data
    if data is not None:
        config = dataclasses.replace(config, validation=data)
    packed = prepare(config, saved.tokenizer, "validation")
    batch_size = saved.experiment.loop.batch_size
    sums = make_evaluate(saved.graphdef, saved.objective)
    with Reporter() as reporter, reporter.task("evaluate", -(-len(packed.tokens) // batch_size), "batches") as task:
        result = score(sums, saved.params, packed, batch_size, saved.mesh, task.update)
    match = exact_match(saved, config, exact_tokens) if config.template is not None and exact_tokens else None
    where = data or config.validation or f"{config.source}, held out"
    record = {
        "run": str(folder),
        "step": saved.step,
        "data": where,
        "bits_per_byte": result.bits_per_byte,
        "nats_per_token": result.nats_per_token,
        "tokens": result.tokens,
        "bytes": packed.num_bytes,
        "tokens_per_second": result.tokens / result.seconds,
        **({} if match is None else {"exact_match": match._asdict() | {"max_tokens": exact_tokens}}),
    }
    run.write_json(json or folder / "evaluation.json", record)
    table = Table(title=f"{folder} at step {saved.step:,} on {where}")
    columns = {
        "bits per byte": f"{result.bits_per_byte:.4f}",
        "nats per token": f"{result.nats_per_token:.4f}",
        "tokens": f"{result.tokens:,}",
        "bytes": f"{packed.num_bytes:,}",
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
    }
    if match is not None:
        columns[f"exact (≤ {exact_tokens} tokens)"] = f"{match.right:,} of {match.asked:,}"
    for column in columns:
        table.add_column(column, justify="right")
    table.add_row(*columns.values())
    Console().print(table)
    if packed.note:
        Console(stderr=True, highlight=False).print(packed.note, markup=False, soft_wrap=True)
    return result
