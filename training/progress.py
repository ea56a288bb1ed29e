"""Progress: a bar with the loss and the time left on a terminal, plain lines otherwise; both on standard error."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """A context. Tasks may follow or enclose each other; notes are lines that stay."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self._bars = Progress(*columns, console=self.console) if self.console.is_terminal else None

    def __enter__(self) -> "Reporter":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def task(self, name: str, total: int, unit: str) -> "Task":
        """Begins to report on a task."""
        return Task(self, name, total, unit)


class Task:
    """One bar, or the lines in its place. A context."""

    def __init__(self, reporter: Reporter, name: str, total: int, unit: str):
        self._reporter, self._name, self._total, self._unit = reporter, name, total, unit
        self._began: tuple[float, int] | None = None  # when the first report came, and what was done by then
        self._said = -SECONDS_BETWEEN_LINES
        bars = reporter._bars
        self._bar = None
        if bars is not None:
            self._bar = bars.add_task(name, total=total, unit=unit, status="")

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._reporter._bars is not None and self._bar is not None:
            self._reporter._bars.remove_task(self._bar)

    def update(self, done: int, status: str = "") -> None:
        """How much is done, and a few words."""
        if self._reporter._bars is not None and self._bar is not None:
            self._reporter._bars.update(self._bar, completed=done, status=status)
            return
        now = time.monotonic()
        began, first = self._began = self._began or (now, done)
        if now - self._said < SECONDS_BETWEEN_LINES and done < self._total:
            return
        self._said = now
        rate = (done - first) / max(now - began, 1e-9)
        left = f" · ETA {(self._total - done) / rate:,.0f} s" if rate > 0 and done < self._total else ""
        self._reporter.note(f"{self._name} {done:,}/{self._total:,} {self._unit}{left}{status and f' · {status}'}")
