"""The report of a comparison: which architecture did better, by how much, how sure, and everything that says so.

What is not measured yet is a dash in the tables and is listed at the top.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.table
from rich.text import Text

from phyla.training import plots
from phyla.training.pages import Block, Bullets, Heading, Paragraph, Plot, Sample, Table, to_html, to_markdown
from phyla.training.plots import NOT_MEASURED, human, mean_and_error

BASELINES = ("1-gram", "2-gram", "3-gram", "4-gram", "5-gram", "xz", "xz primed")
TO_BEAT = ("1-gram", "2-gram", "3-gram")
# Student's t, two-sided 95 %, by degrees of freedom; the last one, the stricter, serves for more.
T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True)
class Results:
    """The records of a comparison, by what they tell; every architecture of the plan is a key of `runs`."""

    runs: dict[str, list[dict]]
    speeds: dict[str, dict]
    baselines: dict[str, float]
    compressed: dict[str, list[dict]]
    """Of the first seed of each architecture: as it was trained (recipe None), by recipe, then runs by their folder."""

    def field(self, name: str, key: str) -> list[float]:
        """One value for each finished seed; NaN where it was not measured or is not finite."""
        return [math.nan if run.get(key) is None else run[key] for run in self.runs[name]]

    def mean(self, name: str, key: str) -> float:
        """Over the seeds; NaN if none has finished or one lacks the value."""
        return mean_and_error(self.field(name, key))[0]

    def ranked(self) -> list[str]:
        """The architectures with a finite loss, the best first."""
        loss = {name: self.mean(name, "bits_per_byte") for name in self.runs}
        return sorted((name for name in loss if math.isfinite(loss[name])), key=loss.__getitem__)

    def context(self) -> int:
        """The largest context at which speed was measured, 0 if none."""
        return max((context for record in self.speeds.values() for context in record["contexts"]), default=0)

    def at_context(self, name: str, key: str) -> float:
        """A field of the speed record at the largest context of all; NaN if it was not measured there."""
        record = self.speeds.get(name, {"contexts": [], key: []})
        value = dict(zip(record["contexts"], record[key], strict=True)).get(self.context())
        return math.nan if value is None else value


def collect(plan: dict, records: Sequence[dict]) -> Results:
    """Sorts the records; of two with the same kind, name and seed the later one counts.

    Raises ValueError for a record of an unknown kind, or of an architecture that the plan does not have.
    """
    runs: dict[str, dict[int, dict]] = {name: {} for name in plan["architectures"]}
    speeds, baselines, compressed = {}, {}, {}
    for record in records:
        kind, name = record["kind"], record["name"]
        if kind not in ("run", "speed", "baseline", "compressed"):
            kinds = "run, speed, baseline, compressed"
            raise ValueError(f"a record of '{name}' has the kind '{kind}', which is none of {kinds}")
        if kind != "baseline" and name not in runs:
            raise ValueError(f"a {kind} record is of '{name}', which is not in the plan: {', '.join(runs)}")
        if kind == "run":
            runs[name][record["seed"]] = record
        elif kind == "speed":
            speeds[name] = record
        elif kind == "compressed":
            compressed.setdefault(name, {})[record["recipe"]] = record
        else:
            baselines[name] = record["bits_per_byte"]
    in_order = {name: [seeds[i] for i in sorted(seeds)] for name, seeds in runs.items()}
    return Results(in_order, speeds, baselines, {name: list(each.values()) for name, each in compressed.items()})


def verdict(plan: dict, results: Results) -> str:
    """The answer in one sentence: which did better, by how much, how sure; and who does not beat the best n-gram."""
    ranked = results.ranked()
    if not ranked:
        return "No architecture has a result yet."
    clauses = [_comparison(results, ranked)]
    grams = {name: results.baselines[name] for name in TO_BEAT if name in results.baselines}
    if grams:
        best = min(grams, key=grams.__getitem__)
        losers = [name for name in ranked if results.mean(name, "bits_per_byte") >= grams[best]]
        if losers:
            verb = "does" if len(losers) == 1 else "do"
            clauses.append(f"{_join(losers)} {verb} not beat the {best} baseline ({grams[best]:.3f})")
    unfinished = any(len(runs) < plan["seeds"] for runs in results.runs.values())
    return f"{'So far, ' if unfinished else ''}{'; '.join(clauses)}."


def _comparison(results: Results, ranked: Sequence[str]) -> str:
    bits = {name: results.field(name, "bits_per_byte") for name in ranked}
    best, n = ranked[0], len(bits[ranked[0]])
    mean, error = mean_and_error(bits[best])
    if len(ranked) == 1:
        size = f"{mean:.3f} ± {error:.3f}" if n > 1 else f"{mean:.3f}"
        return f"{best} reaches {size} bits per byte, and there is nothing to compare it with"
    following, m = ranked[1], len(bits[ranked[1]])
    other_mean, other_error = mean_and_error(bits[following])
    difference, error = other_mean - mean, math.hypot(error, other_error)
    by = f"{mean:.3f} against {other_mean:.3f} bits per byte, {difference:.3f}"
    if min(n, m) > 1:
        by += f" ± {error:.3f} less (standard error over {n if n == m else f'{n} and {m}'} seeds)"
    else:
        by += " less; one seed gives no error bar, so another seed could change the order"
    others = following if len(ranked) == 2 else f"{following}, the second of {len(ranked)}"
    level = [name for name in ranked if f"{mean_and_error(bits[name])[0]:.3f}" == f"{mean:.3f}"]
    if len(level) > 1:
        return f"{_join(level)} tie: {by}"
    if min(n, m) == 1:
        return f"{best} did better than {others}: {by}"
    if difference > T95.get(n + m - 2, T95[10]) * error:
        return f"{best} did better than {others}: {by}, more than the spread between seeds explains (95 % confidence)"
    return (
        f"{best} is ahead of {others}, but not clearly: {by}, "
        "which the spread between seeds could explain (95 % confidence)"
    )


def notices(plan: dict, results: Results) -> list[str]:
    """What is missing, and what went wrong in a run."""
    missing = [
        f"{name} ({len(runs)} of {plan['seeds']} {'seed' if plan['seeds'] == 1 else 'seeds'} trained)"
        for name, runs in results.runs.items()
        if len(runs) < plan["seeds"]
    ]
    missing += [f"the speed of {name}" for name in results.runs if name not in results.speeds]
    absent = [name for name in BASELINES if name not in results.baselines]
    if absent:
        missing.append(f"the baselines ({'all' if len(absent) == len(BASELINES) else ', '.join(absent)})")
    found = [f"This comparison is not finished. Still missing: {'; '.join(missing)}."] if missing else []
    for name, runs in results.runs.items():
        for run, bits in zip(runs, results.field(name, "bits_per_byte"), strict=True):
            if not math.isfinite(bits):
                found.append(f"{name}, seed {run['seed']}: diverged, so {name} has no loss and no rank.")
            if run.get("skipped_updates"):
                found.append(f"{name}, seed {run['seed']}: skipped {run['skipped_updates']} non-finite updates.")
    return found


def main_table(results: Results) -> Table:
    """One row for each architecture, the best loss first; the best value of each column is marked."""
    ranked = results.ranked()
    names = ranked + [name for name in results.runs if name not in ranked]
    at = f" at {results.context():,}" if results.context() else ""

    def mean(key: str) -> list[float]:
        return [results.mean(name, key) for name in names]

    def speed(key: str) -> list[float]:
        return [results.at_context(name, key) for name in names]

    def column(head: str, values: list[float], text: Callable[[float], str], better: Callable | None = None):
        cells = [text(value) if math.isfinite(value) else NOT_MEASURED for value in values]
        finite = [value for value in values if math.isfinite(value)]
        best = text(better(finite)) if better and len(finite) > 1 else None  # what reads the same is as good
        return head, cells, {row for row, cell in enumerate(cells) if cell == best}

    def in_bytes(value: float) -> str:
        return human(value, "B")

    head, losses, marked = column("bits per byte", mean("bits_per_byte"), "{:.3f}".format, min)
    errors = [mean_and_error(results.field(name, "bits_per_byte"))[1] for name in names]
    losses = [f"{x} ± {e:.3f}" if math.isfinite(e) else x for x, e in zip(losses, errors, strict=True)]
    shapes = [
        f"{runs[0]['width']} × {runs[0]['layers']}" if runs else NOT_MEASURED for runs in map(results.runs.get, names)
    ]
    columns = [
        ("architecture", names, set()),
        column("parameters", mean("parameters"), human),
        ("width × layers", shapes, set()),
        (head, losses, marked),
        column("training tokens/s", mean("tokens_per_second"), human, max),
        column("training time", mean("seconds"), "{:,.0f} s".format, min),
        column("MFU", mean("flops_utilisation"), lambda share: f"{100 * share:.0f} %", max),
        column("peak memory", mean("peak_memory_bytes"), in_bytes, min),
        column(f"prefill tokens/s{at}", speed("prefill_tokens_per_second"), human, max),
        column(f"decode tokens/s{at}", speed("decode_tokens_per_second"), human, max),
        column(f"state{at}", speed("state_bytes"), in_bytes, min),
    ]
    heads, cells, best = zip(*columns, strict=True)
    return Table(heads, list(zip(*cells, strict=True)), frozenset((r, c) for c, rows in enumerate(best) for r in rows))


def baseline_table(results: Results) -> Table:
    """Bits per byte of each baseline, in the order of the records."""
    return Table(("baseline", "bits per byte"), [(name, f"{bits:.3f}") for name, bits in results.baselines.items()])


def content(plan: dict, results: Results) -> list[Block]:
    """The whole report, top to bottom: a new section is one more line here."""
    names = list(results.runs)
    title = _join(names) if len(names) < 4 else f"{len(names)} architectures"
    several = any(len(runs) > 1 for runs in results.runs.values())
    blocks: list[Block] = [
        Heading(f"Comparison of {title} at {human(plan['parameters'])} parameters", 1),
        Paragraph(verdict(plan, results), "lead"),
        *(Paragraph(notice, "notice") for notice in notices(plan, results)),
        main_table(results),
        Paragraph(
            f"Bits per byte are of the validation text: lower is better{', ± the standard error' if several else ''}. "
            "MFU is the share of the measured matmul peak. The best value of each column is marked."
        ),
    ]
    for heading, found in (
        ("Baselines", [baseline_table(results)] if results.baselines else []),
        ("Learning curves", _learning_curves(results, several)),
        ("Bits per byte", _bits_per_byte(results, several)),
        ("Speed and state", _speed(results)),
        *([("Compressed", _compressed(results))] if plan.get("compress") or plan.get("beside") else []),
    ):
        blocks += [Heading(heading), *(found or [Paragraph("Not measured yet.")])]
    blocks.append(Heading("Generated text"))
    for name, runs in results.runs.items():
        samples = [Sample(run["prompt"], run["sample"]) for run in runs if run.get("sample")]
        blocks += [Heading(name, 3), samples[0] if samples else Paragraph("Not generated yet.")]
    settings = [  # what was asked, a dict, stands in the command
        (key.replace("_", " "), _setting(value)) for key, value in plan.items() if not isinstance(value, dict)
    ]
    blocks += [Heading("How it was made"), Table(("setting", "value"), settings, numbers=False)]
    return [*blocks, Heading("How it was measured"), Bullets(_notes(plan, results))]


def _learning_curves(results: Results, several: bool) -> list[Block]:
    trained = [run for runs in results.runs.values() for run in runs if run.get("curve")]
    if not trained:
        return []
    caption = "Validation bits per byte against training tokens and against seconds; baselines dashed."
    caption += " Thin lines are seeds, bold lines their mean." if several else ""
    if any(run["curve"][-1]["bits_per_byte"] != run["bits_per_byte"] for run in trained):
        caption += " The curves are of a part of the text, the table and the baselines of all of it."
    return [Plot("learning-curves", plots.learning_curves(results.runs, results.baselines), caption)]


def _bits_per_byte(results: Results, several: bool) -> list[Block]:
    bits = {name: results.field(name, "bits_per_byte") for name in results.runs}
    if not results.ranked() and not results.baselines:
        return []
    caption = "Validation bits per byte of every architecture (filled) and every baseline (open), the best on top."
    caption += " Bars are the standard error over the seeds, small dots the seeds." if several else ""
    return [Plot("bits-per-byte", plots.bits_per_byte(bits, results.baselines), caption)]


def _speed(results: Results) -> list[Block]:
    if not results.context():
        return []
    speed, state = (plot(results.speeds, list(results.runs)) for plot in (plots.speed, plots.state))
    return [
        Plot("speed", speed, "One sequence: reading a context of that length (prefill), writing after it (decode)."),
        Plot(
            "state", state, "What one sequence must keep to go on: KV cache or recurrent state; both axes logarithmic."
        ),
    ]


def compressed_table(results: Results) -> Table:
    """A row for each architecture and recipe; the smallest loss of each recipe is marked."""
    rows, best = [], set()
    lowest: dict[str | None, tuple[float, int]] = {}
    for name, versions in results.compressed.items():
        before = versions[0]
        for each in versions:
            bits = each["bits_per_byte"]
            if bits < lowest.get(each["recipe"], (math.inf, 0))[0]:
                lowest[each["recipe"]] = bits, len(rows)
            rows.append(
                (
                    name,
                    each["recipe"] or "as trained",
                    f"{bits:.3f}",
                    f"{bits / before['bits_per_byte'] - 1:+.2%}" if each is not before else "",
                    f"{each['agreement']:.1%}",
                    f"{each['bits_per_weight']:.2f}",
                    human(each["bytes_in_memory"], "B"),
                    human(each.get("bytes_on_disk", math.nan), "B"),
                    human(each.get("decode", math.nan)),
                )
            )
    if len(results.compressed) > 1:
        best = {(row, 2) for _, row in lowest.values()}
    head = ("architecture", "recipe", "bits per byte", "change", "same top token", "bits per weight", "in memory")
    return Table((*head, "on disk", "decode tokens/s"), rows, frozenset(best))


def _compressed(results: Results) -> list[Block]:
    if not results.compressed:
        return []
    caption = (
        "Validation bits per byte of the first seed of each architecture, as trained (filled), and of what was made of "
        "it, by a recipe or as a run of its own (open), against the bytes of its weights and against decoding speed; "
        "the dashed line is the Pareto front. Losses are of that part of the text which the learning curves are of."
    )
    return [compressed_table(results), Plot("compressed", plots.pareto(results.compressed), caption)]


def _notes(plan: dict, results: Results) -> list[str]:
    sizes = [run["parameters"] for runs in results.runs.values() for run in runs]
    apart = max((abs(size / plan["parameters"] - 1) for size in sizes), default=None)
    met = "" if apart is None else f" (met within {100 * apart:.1f} %)"
    unit = "bytes" if plan["tokenizer"] == "bytes" else "tokens"
    return [
        "Validation bits per byte: over the whole validation text, every byte predicted once, with at most "
        f"{plan['sequence_length']:,} {unit} of context; the n-gram and xz baselines code the same text.",
        f"Every architecture saw the same {human(plan['tokens'])} tokens in the same order. Its width was chosen for "
        f"{human(plan['parameters'])} parameters{met}.",
        "±: standard error of the mean over the seeds (n - 1 under the squares); of a difference, the root of the sum "
        "of both squares. 95 % confidence: Student's t between the best and the next, not corrected for several pairs.",
        "Training tokens/s, training time and MFU: means over the seeds, with the clock stopped for compilation, "
        "validation and checkpoints. MFU is the floating-point operations a second that the model needs, over the "
        "matmul peak measured on this device.",
        "Peak memory: of one training step, as the compiler reports it.",
        "Prefill, decode and state: one sequence, at the context named; the state is its KV cache or recurrent state.",
        f"All times were measured on this machine: {plan['device']}.",
    ]


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _setting(value: object) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def summary_table(plan: dict, records: Sequence[dict]) -> rich.table.Table:
    """The main table for a terminal, the baselines under it and the answer below.

    Raises ValueError for records that do not fit the plan.
    """
    results = collect(plan, records)
    table = main_table(results)
    hidden = ("parameters", "width × layers", "training time", "MFU", "peak memory")  # eighty columns are few
    shown = [c for c, head in enumerate(table.head) if head not in hidden]
    answer = "\n".join([verdict(plan, results), *notices(plan, results)])
    summary = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=Text(answer), caption_justify="left", pad_edge=False)
    for c in shown:
        head = table.head[c].replace(" tokens", "\ntokens").replace(" at", "\nat")
        left = table.head[c] in ("architecture", "bits per byte")
        summary.add_column(head, justify="left" if left else "right", vertical="bottom")
    for r, row in enumerate(table.rows):
        summary.add_row(*(Text(row[c], "bold green" if (r, c) in table.best else "") for c in shown))
    summary.add_section()
    for name, bits in baseline_table(results).rows:
        summary.add_row(Text(name, "dim"), Text(bits, "dim"))
    return summary


def write_report(folder: Path, plan: dict, records: Sequence[dict]) -> None:
    """Writes report.html, report.md and the figures; each file is replaced whole or not at all.

    Raises ValueError for records that do not fit the plan, before anything is written.
    """
    blocks = content(plan, collect(plan, records))
    files = {f"{block.name}.png": block.png for block in blocks if isinstance(block, Plot)}
    files["report.md"] = to_markdown(blocks).encode()
    files["report.html"] = to_html(blocks).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
