"""What a compiler says of a program for a chip that is not here.

For a TPU, how long it would take: its instructions counted, its bytes over the bandwidth. For a GPU, its registers.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phyla.training.bench import bundles, compile
from phyla.training.targets import GPUS


class Job(NamedTuple):
    """One program."""

    problem: str
    direction: str
    implementation: str


def estimates(target: str, jobs: Sequence[Job], script: Sequence[str] = ("-m", compile.__name__)) -> Iterator[Any]:
    """(job, `estimate`) of each, as they come: as many at once as there are cores."""
    workers = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(estimate, target, job, script): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def estimate(target: str, job: Job, script: Sequence[str] = ("-m", compile.__name__)) -> dict[str, Any]:
    """What the compiler's bundles and the compiler say of a program; for a GPU, only the compiler and the assembler.

    cycles; moved, bytes between HBM and the chip; kernels, the cycles of each; assumed, how many branches and copies
    depend on data and were counted; loops, how often one of a length that depends on data ran once; compiler, its own
    analysis, with the bytes of temporaries; assembled, `compile.assembler` of each of a GPU's kernels. Or error: one
    line.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = (target, job.problem, job.implementation, job.direction, folder)
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *script, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        written = Path(folder, "result.json")
        if not written.exists():
            return {"error": _last_error(done.stderr) or f"the compiler ended with status {done.returncode}"}
        result = json.loads(written.read_text())
        if target in GPUS:
            return result
        try:
            count = bundles.count(bundles.read(Path(folder)))
        except bundles.Unreadable as error:
            return result | {"error": str(error)}
    kernels = {name: count.operations[name] for name in result.pop("kernels") if name in count.operations}
    return result | {
        "cycles": count.cycles,
        "moved": count.bytes,
        "kernels": kernels,
        "assumed": count.assumed,
        "loops": count.loops,
    }


def _last_error(text: str) -> str:
    """Python's last words, without what other libraries print to the same place."""
    said: Callable[[str], bool] = lambda line: bool(line) and line[0].isalpha() and ": " in line  # noqa: E731
    lines = [line for line in text.splitlines() if said(line) and not line.startswith(("WARNING", "I0", "W0", "E0"))]
    return lines[-1][:300] if lines else ""
