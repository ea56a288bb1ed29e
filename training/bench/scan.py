"""`phyla bench scan`: what the selective scan costs."""

import math
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from rich.console import Console
from rich.table import Table

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers import mamba
from phyla.training import machine, run, sharding
from phyla.training.bench import BATCH, LENGTH
from phyla.training.bench.timing import training_step
from phyla.training.config import Experiment, LoopConfig, MeshConfig
from phyla.training.progress import Reporter


def bench_scan(json: Path | None, rounds: int) -> None:
    """How much of a Mamba training step the selective scan takes: the step's time over that without the scan.

    d 256, 4 layers, batch 4 × 512, vocabulary 4096, float32, on all of this machine's devices.
    """
    block = BlockConfig(mixer=mamba.MambaConfig())
    model = ModelConfig(width=256, layers=4, vocab_size=4096, pattern=(block,))
    experiment = Experiment(name="bench", model=model, loop=LoopConfig(batch_size=BATCH))
    mesh = sharding.make_mesh(MeshConfig(data=math.gcd(BATCH, jax.device_count())), BATCH)
    with Reporter() as reporter, reporter.task("bench scan", rounds + 2, "rounds") as task:
        with_scan = training_step(experiment, mesh).once
        task.update(1)
        with mock.patch.object(mamba, "selective_scan", _identity):
            without = training_step(experiment, mesh).once
        task.update(2)
        times: dict[str, list[float]] = {"with": [], "without": []}
        for i in range(rounds):
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
