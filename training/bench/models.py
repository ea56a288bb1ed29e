"""`phyla bench models`: every architecture at one size, against this machine's limits and against PyTorch."""

import contextlib
import importlib.metadata
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from phyla.models import formats, sizes
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.training import machine, run, sharding
from phyla.training.bench import BATCH, LENGTH
from phyla.training.bench.peers import Peers, start
from phyla.training.bench.timing import PROMPT, TOKENS, Inference, Timed, training_step
from phyla.training.config import Experiment, LoopConfig, MeshConfig
from phyla.training.progress import Reporter

PHASES = {"train": BATCH * LENGTH, "prefill": BATCH * LENGTH, "decode": TOKENS}
"""What is timed, and how many tokens it takes."""

TOLERANCE = 0.01
"""Relative difference of the parameters of a pair."""


class Architecture(NamedTuple):
    """A model to measure."""

    model: ModelConfig
    peer: str | None
    """The format in which transformers has the same model; None if it has not."""


def bench_models(
    architectures: Mapping[str, Architecture], *, json: Path | None, rounds: int, peers: Path | None = None
) -> None:
    """Times a training step, prefill and greedy decoding of each architecture, and prints and writes one table.

    Each round times ours and the peer's in turn, so that what else the machine does touches both alike. Each works
    twice in a row and the second time counts, as one step of many does: while the other one works, memory and caches
    are lost. Figures are medians of the rounds; a ratio is the median of the rounds' ratios.

    Args:
        architectures: by name.
        json: where all figures go; None: runs/bench-models.json. Rewritten after every architecture.
        rounds: how often each is timed, after one that is not.
        peers: an interpreter that has torch and transformers (and mambapy).

    Raises UserError if the interpreter cannot do its part, or has a model of another size.
    """
    mesh = sharding.make_mesh(MeshConfig(data=math.gcd(BATCH, jax.device_count())), BATCH)
    record: dict[str, Any] = {
        "device": machine.description(mesh),
        "versions": {"jax": importlib.metadata.version("jax")},
        "batch": BATCH,
        "length": LENGTH,
        "rounds": rounds,
        "models": {},
    }
    with contextlib.ExitStack() as stack:
        peer = None if peers is None else stack.enter_context(start(peers))
        record["versions"] |= {} if peer is None else peer.versions
        reporter = stack.enter_context(Reporter())
        task = stack.enter_context(reporter.task("bench models", len(architectures) * (rounds + 1), "rounds"))
        record["peak_flops"] = machine.matmul_peak(mesh, "float32")
        done = 0
        for name, architecture in architectures.items():
            objective = "masked-token" if architecture.model.bidirectional else "next-token"
            experiment = Experiment(
                name=name, model=architecture.model, objective=objective, loop=LoopConfig(batch_size=BATCH)
            )
            pair = Pair(experiment, mesh, peer if architecture.peer else None, architecture.peer)
            times = []
            for _ in range(rounds + 1):
                times.append(pair.round())
                done += 1
                task.update(done, name)
            record["models"][name] = pair.figures(times[1:], record["peak_flops"])
            run.write_json(json or Path("runs") / "bench-models.json", record)
            jax.clear_caches()
    Console().print(table(record))


class Pair:
    """Our model, compiled, and perhaps the peer's."""

    def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh, peers: Peers | None, format: str | None):
        self.experiment, self.peers = experiment, peers
        self.parameters = sizes.count(experiment.model)
        self.peer_parameters = None
        if peers is not None and format is not None:
            layout = formats.named(format)
            config = {"model_type": layout.name} | layout.to_config(experiment.model)
            self.peer_parameters = peers.ask("build", config=config, batch=BATCH, length=LENGTH)["parameters"]
            if not math.isclose(self.parameters, self.peer_parameters, rel_tol=TOLERANCE):
                raise UserError(
                    f"{experiment.name} has {self.parameters:,} parameters here and {self.peer_parameters:,} in "
                    f"transformers: no fair pair"
                )
        step, inference = training_step(experiment, mesh), Inference(experiment, mesh)
        self.peak_memory = step.peak_memory
        ours = {"train": step.once, "prefill": inference.prefill(), "decode": inference.decode()}
        self.ours: dict[str, Timed] = {phase: once for phase, once in ours.items() if once is not None}
        self.peer_peak_memory: int | None = None

    def round(self) -> dict[str, tuple[float, float | None]]:
        """Seconds of each phase: ours, and the peer's."""
        return {phase: (_warm(once), self._peer_seconds(phase)) for phase, once in self.ours.items()}

    def _peer_seconds(self, phase: str) -> float | None:
        if self.peers is None:
            return None
        options = {"prompt": PROMPT, "tokens": TOKENS} if phase == "decode" else {}
        peers = self.peers
        seconds = _warm(lambda: peers.ask(phase, **options)["seconds"])
        if phase == "train" and self.peer_peak_memory is None:
            self.peer_peak_memory = self.peers.ask("memory")["peak"]
        return seconds

    def figures(self, rounds: list[dict[str, tuple[float, float | None]]], peak_flops: float) -> dict[str, Any]:
        """What the rounds say.

        `peak_memory` is what our compiled training step needs at once; `peer_peak_memory` how much the peer's process
        had grown after its first one.
        """
        model = self.experiment.model
        figures: dict[str, Any] = {
            "width": model.width,
            "layers": model.layers,
            "vocab_size": model.vocab_size,
            "parameters": self.parameters,
            "peer_parameters": self.peer_parameters,
            "encoder": self.experiment.model.bidirectional,
            "peak_memory": self.peak_memory,
            "peer_peak_memory": self.peer_peak_memory,
        }
        flops = sizes.flops_per_token(model, LENGTH)
        for phase in self.ours:
            seconds, peer_seconds = zip(*(each[phase] for each in rounds), strict=True)
            speed = PHASES[phase] / statistics.median(seconds)
            figures[phase] = {"seconds": seconds, "tokens_per_second": speed}
            if phase != "decode":  # one token at a time is bound by memory, not by products
                figures[phase]["of_peak"] = speed * flops * (3 if phase == "train" else 1) / peak_flops
            if self.peers is not None:
                figures[phase] |= {
                    "peer_seconds": peer_seconds,
                    "peer_tokens_per_second": PHASES[phase] / statistics.median(peer_seconds),
                    "ratio": statistics.median(b / a for a, b in zip(seconds, peer_seconds, strict=True)),
                }
        return figures


def _warm(once: Timed) -> float:
    once()
    return once()


def table(record: dict[str, Any]) -> Table:
    """One row an architecture, narrow enough for a terminal."""
    peers = "torch" in record["versions"]
    first = next(iter(record["models"].values()))
    caption = (
        f"Tokens per second; float32, d {first['width']}, {first['layers']} layers, vocabulary {first['vocab_size']}, "
        f"{BATCH} × {LENGTH} tokens, decoding 1 × {TOKENS}. {record['device']}, matmul peak "
        f"{record['peak_flops'] / 1e9:,.0f} GFLOP/s, jax {record['versions']['jax']}."
    )
    if peers:
        versions = f"transformers {record['versions']['transformers']}, torch {record['versions']['torch']}"
        caption += f" ×: ours over PyTorch's ({versions})."
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    result.add_column("", no_wrap=True)
    heads = ["size", "MB", *(["PyTorch\nMB"] if peers else [])]
    for phase in PHASES:
        heads += [phase, *([] if phase == "decode" else ["of\npeak"]), *(["×"] if peers else [])]
    for head in heads:
        result.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    for name, figures in record["models"].items():
        cells = [_or_dash(figures["parameters"] / 1e6, "{:.2f} M"), _megabytes(figures["peak_memory"])]
        cells += [_megabytes(figures["peer_peak_memory"])] if peers else []
        for phase in PHASES:
            found = figures.get(phase, {})
            cells.append(_or_dash(found.get("tokens_per_second"), "{:,.0f}"))
            cells += [] if phase == "decode" else [_or_dash(found.get("of_peak"), "{:.0%}")]
            cells += [_or_dash(found.get("ratio"), "{:.2f}")] if peers else []
        result.add_row(name, *cells)
    return result


def _megabytes(value: int | None) -> str:
    return _or_dash(None if value is None else value / 1e6, "{:,.0f}")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
