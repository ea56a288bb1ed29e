"""`phyla bench kernels`: each op, forward and backward, against what its bytes and its operations allow.

For a TPU that is not here, the estimate is static (`bundles`): the compiled program's instructions at one a cycle, or
its bytes at the published bandwidth, whichever takes longer, but no less than the bound: bundles may hand products to
the matrix units faster than those take them. For a GPU that is not here, every kernel is compiled to machine code. On
the device that is here, times are medians.
"""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from phyla.models.errors import UserError, choose
from phyla.training import machine, run, sharding
from phyla.training.bench.problems import CHIP, CPU, DIRECTIONS, PROBLEMS, Problem, Size, Work
from phyla.training.bench.static import Job, estimates
from phyla.training.config import MeshConfig
from phyla.training.progress import Reporter
from phyla.training.targets import CHIPS, GPUS, KINDS

TARGETS = (*CHIPS, *GPUS, "cpu")
WIDTH = 100
"""Of what is printed into a file; a terminal has its own."""
SHORT = 64
"""Tokens from which on no implementation may be slower than the reference."""


class Limits(NamedTuple):
    """What a device can do in a second."""

    bandwidth: float  # bytes
    matrix: Callable[[str], float]  # operations, by dtype
    vector: float
    transcendental: float


def bench_kernels(ops: Sequence[str], *, target: str | None, json: Path | None, rounds: int) -> None:
    """Prints and writes what each op takes, and what it would take at least.

    Args:
        ops: names of ops, or of problems of theirs; none: all.
        target: of `TARGETS`; None: the device that is here, or v5e where that is a CPU.
        json: where all figures go; None: runs/bench-kernels.json. Rewritten after every program.
        rounds: how often a program is timed, where it is.

    Raises UserError for a name that is not known, or a device that is not here.
    """
    names = chosen(ops)
    here = jax.default_backend()
    kind = KINDS.get(jax.devices()[0].device_kind)
    if target is None:
        target = kind or ("gpu" if here == "gpu" else "v5e")
    timed = target in (kind, here)
    if not timed and target not in CHIPS | GPUS:
        known = ", ".join(CHIPS | GPUS)
        raise UserError(f"--target {target}: this machine's device is a {here}; a chip to compile for: {known}")
    if target in GPUS and importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(f"--target {target}: no compiler for GPUs is installed; it comes with pip install 'phyla[gpu]'")
    size = CPU if target == "cpu" else CHIP
    record: dict[str, Any] = {"target": target, "size": [size.B, size.T, size.D], "device": None, "rows": []}
    path = json or Path("runs") / "bench-kernels.json"
    limits = None
    if target in CHIPS | GPUS:
        limits = published(target)
        static(target, names, limits, record, path)
    if timed:
        mesh = sharding.make_mesh(MeshConfig(data=1), 1)
        record["device"] = machine.description(mesh)
        limits = limits or measured(mesh)
        clocked(names, size, limits, rounds, record, path)
    assert limits is not None
    record["limits"] = {"bandwidth": limits.bandwidth, "matrix": limits.matrix("bfloat16")}
    run.write_json(path, record)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in tables(record):
        console.print(table)


def chosen(ops: Sequence[str]) -> list[str]:
    """Problems by name, for names of ops or of problems."""
    known = dict.fromkeys([*(name.partition(" ")[0] for name in PROBLEMS), *PROBLEMS])
    wanted = {choose("op", op, known) for op in ops} or set(PROBLEMS)
    return [name for name in PROBLEMS if {name, name.partition(" ")[0]} & wanted]


def published(target: str) -> Limits:
    """Of a chip."""
    chip = (CHIPS | GPUS)[target]
    rates = {"bfloat16": chip.flops, "int8": chip.int8, "float8": chip.float8}
    return Limits(chip.bandwidth, rates.__getitem__, chip.vector, chip.transcendental)


def measured(mesh: jax.sharding.Mesh) -> Limits:
    """Of this machine: any operation at the rate of those of a matrix product."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    peak = machine.matmul_peak(mesh, dtype)
    return Limits(machine.memory_bandwidth(mesh), lambda dtype: peak, peak, peak)


def bound(moved: int, work: Work, limits: Limits) -> tuple[float, str]:
    """Seconds that the slowest of a device's parts needs at least, and which part that is."""
    seconds = {
        "memory": moved / limits.bandwidth,
        "matrix": work.matrix / limits.matrix(work.dtype),
        "vector": work.vector / limits.vector,
        "exp": work.transcendental / limits.transcendental,
    }
    part = max(seconds, key=seconds.__getitem__)
    return seconds[part], part


def row(problem: Problem, job: Job, limits: Limits) -> dict[str, Any]:
    """What is known of a program beforehand."""
    moved, work = problem.bytes(job.direction), problem.work[job.direction]
    seconds, part = bound(moved, work, limits)
    return job._asdict() | {"bytes": moved, "work": work._asdict(), "bound": seconds, "by": part}


def static(target: str, names: Sequence[str], limits: Limits, record: dict[str, Any], path: Path) -> None:
    """Adds rows with estimates."""
    made = {name: PROBLEMS[name](CHIP) for name in names}
    jobs = [
        Job(name, direction, implementation)
        for name, problem in made.items()
        for direction in DIRECTIONS
        for implementation in ("gpu" if target in GPUS else "tpu", "xla")
        if implementation in problem.implementations()
    ]
    found = {}
    with Reporter() as reporter, reporter.task(f"compile for {target}", len(jobs), "programs") as task:
        for job, estimate in estimates(target, jobs):
            found[job] = row(made[job.problem], job, limits) | estimate
            found[job] |= estimated(found[job], target)
            record["rows"] = [found[each] for each in jobs if each in found]
            run.write_json(path, record)
            task.update(len(found), f"{job.problem} {job.direction}, {job.implementation}")


def estimated(each: dict[str, Any], target: str) -> dict[str, float]:
    """Seconds of a row with cycles: all of its program, and alone what is in its kernels. At least the bound."""
    if "cycles" not in each:
        return {}
    chip, kernels = (CHIPS | GPUS)[target], sum(each["kernels"].values())
    alone = {"alone": max(each["bound"], kernels / chip.clock)} if kernels else {}
    return {"seconds": max(each["bound"], each["cycles"] / chip.clock, each["moved"] / chip.bandwidth)} | alone


def clocked(names: Sequence[str], size: Size, limits: Limits, rounds: int, record: dict[str, Any], path: Path) -> None:
    """Adds to the rows, or adds rows, with medians of the times on this machine's device."""
    short = size._replace(T=SHORT)
    backend = jax.default_backend()
    rows = {Job(each["problem"], each["direction"], each["implementation"]): each for each in record["rows"]}
    with Reporter() as reporter, reporter.task("time", len(names), "ops") as task:
        for done, name in enumerate(names):
            for direction in DIRECTIONS:
                problem, brief = PROBLEMS[name](size), PROBLEMS[name](short)
                fast = [each for each in (backend, "xla") if each in problem.implementations()]
                # The reference takes a token at a time: a check for CPUs, a waste of others' time.
                known = [*fast, "reference"] if backend == "cpu" and problem.in_time else fast
                medians = {"": clock(problem, direction, known, rounds)}
                if "reference" in known:
                    medians["_short"] = clock(brief, direction, known, rounds)
                    if direction == "backward":  # alone it may do again what the reference has kept
                        medians["_both"] = clock(problem, "both", known, rounds)
                        medians["_both_short"] = clock(brief, "both", known, rounds)
                for implementation in known:
                    job = Job(name, direction, implementation)
                    each = rows.setdefault(job, row(problem, job, limits))
                    each["measured"] = medians[""][implementation]
                    if "reference" in known:
                        each |= {
                            f"times_faster{of}": took["reference"] / took[implementation]
                            for of, took in medians.items()
                        }
            record["rows"] = list(rows.values())
            run.write_json(path, record)
            task.update(done + 1, name)
            jax.clear_caches()


def clock(problem: Problem, direction: str, implementations: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds of each, timed in turn after a run that is not."""
    once = {}
    for implementation in implementations:
        function, shapes = problem.function(implementation, direction)
        once[implementation] = functools.partial(jax.jit(function).lower(*shapes).compile(), *values(shapes))
    times: dict[str, list[float]] = {implementation: [] for implementation in implementations}
    for each in range(rounds + 1):
        for implementation, call in once.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if each:
                times[implementation].append(time.perf_counter() - start)
    return {implementation: statistics.median(each) for implementation, each in times.items()}


def values(shapes: Any) -> Any:
    """Numbers in (-0.01, 0), of which any may be a decay rate, a logarithm or an input; integers are zero."""
    rng = np.random.default_rng(0)

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(-0.01 * rng.random(leaf.shape, np.float32), leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(one, shapes)


def tables(record: dict[str, Any]) -> list[Table]:
    """One of estimates, one of times, if there are any."""
    rows = record["rows"]
    found = []
    if record["target"] in GPUS:
        found.append(compiled_table(record))
    elif any("cycles" in each or "error" in each for each in rows):
        found.append(static_table(record))
    if any("measured" in each for each in rows):
        found.append(clocked_table(record))
    return found


def static_table(record: dict[str, Any]) -> Table:
    """A row for each op and direction: the kernel, and XLA beside it."""
    target, (B, T, D) = record["target"], record["size"]
    caption = (
        f"{target} at {CHIPS[target].clock / 1e9:g} GHz, bfloat16, {B} × {T} tokens, width {D}. Static estimates, no "
        "measurement: instructions at one a cycle, or bytes at the published bandwidth, or the bound, whichever takes "
        "longest; no waiting for copies. MB, Gop: what must be moved and done. of: the bound they imply over the "
        "estimate; alone: over the kernel's own instructions, without what XLA does around it, such as copies into "
        "its layout. says: the compiler's own estimate. ×: XLA's time over the kernel's."
    )
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    heads = ("MB", "Gop", "bound\nµs", "by", "kernel\ncycles", "\nµs", "\nof", "\nalone")
    heads += ("XLA\nµs", "\nof", "\nsays", "×")
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    notes = []
    for (name, direction), pair in _pairs(record["rows"]).items():
        kernel, xla = pair.get("tpu", {}), pair.get("xla", {})
        any_ = kernel or xla
        both = "seconds" in kernel and "seconds" in xla
        table.add_row(
            _title(name, direction),
            f"{any_['bytes'] / 1e6:,.0f}",
            f"{sum(any_['work'][part] for part in ('matrix', 'vector', 'transcendental')) / 1e9:,.1f}",
            _micro(any_["bound"]),
            any_["by"],
            f"{kernel['cycles']:,}" if "cycles" in kernel else "–",
            _micro(kernel.get("seconds")),
            _share(kernel),
            f"{kernel['bound'] / kernel['alone']:.0%}" if "alone" in kernel else "–",
            _micro(xla.get("seconds")),
            _share(xla),
            _micro(xla.get("compiler", {}).get("seconds")),
            f"{xla['seconds'] / kernel['seconds']:.1f}" if both else "–",
        )
        for implementation, each in pair.items():
            said = [each["error"]] if "error" in each else [*each.get("warnings", [])]
            if each.get("loops"):
                said.append("as long as every chunk is of one document: a loop that depends on data is counted once")
            notes += [f"{name} {direction}, {implementation}: {line}" for line in said]
    table.caption = "\n".join([caption, *notes])
    return table


def compiled_table(record: dict[str, Any]) -> Table:
    """A row for each op and direction: what the compilers say of a GPU's kernels, and XLA beside it."""
    target, (B, T, D) = record["target"], record["size"]
    caption = (
        f"{target}, bfloat16, {B} × {T} tokens, width {D}: compiled to machine code, not run. MB, Gop: what must be "
        "moved and done, and the bound that they imply. Of a thread of the kernel: registers, and bytes of them "
        "spilled. Temporaries: of the whole program."
    )
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for head in ("MB", "Gop", "bound\nµs", "by", "regis-\nters", "\nspilled", "tempo-\nraries", "XLA's\nMB"):
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    notes = []

    def temporaries(each: dict[str, Any]) -> str:
        if "compiler" not in each:
            return "?" if "error" in each else "–"
        return f"{each['compiler']['temporaries'] / 1e6:,.0f}"

    for (name, direction), pair in _pairs(record["rows"]).items():
        kernel, xla = pair.get("gpu", {}), pair.get("xla", {})
        any_, assembled = kernel or xla, kernel.get("assembled", [])
        table.add_row(
            _title(name, direction),
            f"{any_['bytes'] / 1e6:,.0f}",
            f"{sum(any_['work'][part] for part in ('matrix', 'vector', 'transcendental')) / 1e9:,.1f}",
            _micro(any_["bound"]),
            any_["by"],
            " ".join(str(each["registers"]) for each in assembled) or "–",
            " ".join(str(each["spilled"]) for each in assembled) or "–",
            temporaries(kernel),
            temporaries(xla),
        )
        for implementation, each in pair.items():
            said = [each["error"]] if "error" in each else each.get("warnings", [])
            notes += [f"{name} {direction}, {implementation}: {line}" for line in said]
    table.caption = "\n".join([caption, *notes])
    return table


def clocked_table(record: dict[str, Any]) -> Table:
    """A row for each op, direction and implementation."""
    B, T, D = record["size"]
    checked = any("times_faster" in each for each in record["rows"])
    caption = f"Medians on {record['device']}; {B} × {T} tokens, width {D}. of: the bound over the time."
    if checked:
        caption += (
            f" The bounds are those of a matmul peak of {record['limits']['matrix'] / 1e9:,.0f} GFLOP/s and a memory "
            f"bandwidth of {record['limits']['bandwidth'] / 1e9:,.1f} GB/s, both measured. ×: the time of the "
            f"reference, a token at a time, over this; also at {SHORT} tokens, and of both, forward and backward: "
            "backward alone computes again what the reference has kept."
        )
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    heads = ["MB", "Gop", "bound\nµs", "by", "\nµs", "\nof"]
    heads = [*heads, "\n×", f"\n× {SHORT}", "both\n×", f"\n× {SHORT}"] if checked else ["", *heads, "estimate\nµs"]
    for head in heads:
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    slower = []
    for each in record["rows"]:
        if "measured" not in each or each["implementation"] == "reference":
            continue
        gained = [each.get(f"times_faster{of}") for of in ("", "_short", "_both", "_both_short")]
        slower += [
            f"{each['problem']} {which}"
            for which, ratios in ((each["direction"], gained[:2]), ("both", gained[2:]))
            if min((ratio for ratio in ratios if ratio), default=1) < 1
        ]
        table.add_row(
            _title(each["problem"], each["direction"]),
            *([] if checked else [each["implementation"]]),
            f"{each['bytes'] / 1e6:,.1f}",
            f"{sum(each['work'][part] for part in ('matrix', 'vector', 'transcendental')) / 1e9:,.2f}",
            _micro(each["bound"]),
            each["by"],
            _micro(each["measured"]),
            f"{each['bound'] / each['measured']:.0%}",
            *([f"{ratio:.2f}" if ratio else "–" for ratio in gained] if checked else [_micro(each.get("seconds"))]),
        )
    if checked:
        verdict = f"Slower than the reference: {', '.join(slower)}." if slower else "None is slower than the reference."
        table.caption = f"{caption} {verdict}"
    return table


def _pairs(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for each in rows:
        pairs.setdefault((each["problem"], each["direction"]), {})[each["implementation"]] = each
    return pairs


def _title(name: str, direction: str) -> str:
    return f"{name.removeprefix('quantized_matmul ')} {'→' if direction == 'forward' else '←'}"


def _micro(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.0f}"


def _share(each: dict[str, Any]) -> str:
    return f"{each['bound'] / each['seconds']:.0%}" if "seconds" in each else "?" if "error" in each else "–"
