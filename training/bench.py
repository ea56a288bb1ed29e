"""Benchmarks: ratios measured in one run, interleaved, as medians; machines are noisy."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.language_model import LanguageModel
from phyla.models.mixers import mamba
from phyla.training import machine, run, sharding
from phyla.training.config import Experiment, LoopConfig, MeshConfig
from phyla.training.optimizer import make_optimizer
from phyla.training.progress import Reporter
from phyla.training.saved import make_objective
from phyla.training.step import initial_state, make_step

BATCH, LENGTH, VOCABULARY = 4, 512, 4096
ROUNDS = 15


def bench_scan(json: Path | None) -> None:
    """How much of a Mamba training step the selective scan takes: the step's time over that without the scan.

    d 256, 4 layers, batch 4 × 512, vocabulary 4096, float32, on all of this machine's devices.
    """
    block = BlockConfig(mixer=mamba.MambaConfig())
    model = ModelConfig(width=256, layers=4, vocab_size=VOCABULARY, pattern=(block,))
    experiment = Experiment(name="bench", model=model, loop=LoopConfig(batch_size=BATCH))
    mesh = sharding.make_mesh(MeshConfig(), BATCH)
    with Reporter() as reporter, reporter.task("bench scan", ROUNDS + 2, "rounds") as task:
        with_scan = _training_step(experiment, mesh)
        task.update(1)
        with mock.patch.object(mamba, "selective_scan", _identity):
            without = _training_step(experiment, mesh)
        task.update(2)
        times: dict[str, list[float]] = {"with": [], "without": []}
        for i in range(ROUNDS):
            times["with"].append(with_scan())
            times["without"].append(without())
            task.update(i + 3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["with"], times["without"], strict=True))
    tokens = BATCH * LENGTH
    record = {
        "device": machine.description(mesh),
        "seconds_with_scan": medians["with"],
        "seconds_without_scan": medians["without"],
        "tokens_per_second": tokens / medians["with"],
        "ratio": ratio,
    }
    run.write_json(json or Path("runs") / "bench-scan.json", record)
    table = Table(title=f"Mamba training step, d 256, 4 layers, {BATCH} × {LENGTH} tokens, {record['device']}")
    for column in ("", "ms a step", "tokens/s"):
        table.add_column(column, justify="right")
    for name, title in (("with", "with the scan"), ("without", "scan replaced by the identity")):
        table.add_row(title, f"{1000 * medians[name]:.0f}", f"{tokens / medians[name]:,.0f}")
    table.add_row("ratio (median of pairs)", f"{ratio:.3f}", "")
    Console().print(table)


def _identity(x: jax.Array, *unused: Any, **options: Any) -> tuple[jax.Array, None]:
    return x, None


def _training_step(experiment: Experiment, mesh: jax.sharding.Mesh) -> Callable[[], float]:
    """Compiles a training step; calling it takes one step and gives its seconds."""
    graphdef, params = nnx.split(sizes.abstract(experiment.model))
    optimizer = make_optimizer(experiment.optimizer, experiment.loop.steps, params)

    def init() -> Any:
        return initial_state(nnx.state(LanguageModel(experiment.model, nnx.Rngs(0))), optimizer, experiment.loop)

    layout = sharding.shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=layout)()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1), dtype=np.int32)
    batch = sharding.put_batch({"tokens": tokens, "segment_ids": np.ones_like(tokens)}, mesh)
    step = make_step(graphdef, make_objective(experiment), optimizer, experiment.loop)
    whole = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(layout, whole)).lower(state, batch).compile()
    state = jax.block_until_ready(compiled(state, batch)[0])

    def once() -> float:
        nonlocal state
        begin = time.perf_counter()
        state = jax.block_until_ready(compiled(state, batch)[0])
        return time.perf_counter() - begin

    return once
