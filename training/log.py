"""What a run says of itself: lines of metrics.jsonl, TensorBoard events, and the clock and counters behind them."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phyla.models.errors import UserError
from phyla.training import machine
from phyla.training.step import Metrics

FILE = "metrics.jsonl"


class Log:
    """Counts tokens and training seconds (validation and checkpoints stop the clock) and writes the metrics.

    Args:
        folder: the run directory; lines of metrics.jsonl after `step` are dropped, since they will be made again.
        step: where training continues.
        tokens: trained so far.
        seconds: trained so far.
        bytes_per_token: of the text, for bits per byte.
        flops_per_token: of a training step.
        peak_flops: of the devices, per second.
        tensorboard: also write TensorBoard events.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        tokens: int,
        seconds: float,
        bytes_per_token: float,
        flops_per_token: float,
        peak_flops: float,
        tensorboard: bool,
    ):
        self.tokens, self._seconds = tokens, seconds
        self._bits_per_nat = 1 / math.log(2) / bytes_per_token
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._path = folder / FILE
        kept = [line for line in read(folder) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._events = _tensorboard(folder) if tensorboard else None
        self._began: float | None = time.perf_counter()  # None while the clock is stopped
        self._since = tokens, seconds  # of the last line

    @property
    def seconds(self) -> float:
        """Spent in training steps."""
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock."""
        self._seconds, self._began = self.seconds, None
        try:
            yield
        finally:
            self._began = time.perf_counter()

    def count(self, metrics: Metrics) -> None:
        """Counts a step's tokens."""
        self.tokens += int(metrics.tokens)

    def utilisation(self, tokens_per_second: float) -> float:
        """The share of the matmul peak that the model's own operations use (Chowdhery et al. 2022, appendix B)."""
        return tokens_per_second * self._flops_per_token / self._peak_flops

    def train(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """Writes the line of a step: its loss, and the speed since the last line."""
        tokens, seconds = self.tokens, self.seconds
        speed = (tokens - self._since[0]) / (seconds - self._since[1])
        self._since = tokens, seconds
        line = {
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
            "loss": float(metrics.loss),
            "bits_per_byte": float(metrics.loss) * self._bits_per_nat,
            "gradient_norm": float(metrics.gradient_norm),
            "tokens_per_second": speed,
            "flops_utilisation": self.utilisation(speed),
            "memory_bytes": machine.memory_in_use(),
            "skipped": int(metrics.skipped),
            **{name: float(value) for name, value in metrics.extra.items()},
        }
        self._write(line)
        return line

    def validation(self, step: int, bits_per_byte: float, nats_per_token: float, *, whole: bool) -> None:
        """Writes the line of a validation."""
        line = {"validation_bits_per_byte": bits_per_byte, "validation_loss": nats_per_token, "whole_text": whole}
        self._write({"step": step, "tokens": self.tokens, "seconds": self.seconds, **line})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._events is not None:
            for name, value in line.items():
                if name != "step":
                    self._events.add_scalar(name, float(value), line["step"])


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line cut short by a crash is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UserError("loop.tensorboard needs the extra: pip install 'phyla[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"))
