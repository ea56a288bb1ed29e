"""`phyla compress`: a run with a smaller model made of a run, and what that cost."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Column, Table

from phyla.compression.calibrate import Moments
from phyla.compression.compress import Measure, Step, abstract, compress, shaping
from phyla.compression.entropy import Huffman
from phyla.compression.huffman import Sizes
from phyla.compression.matrices import dotted, kind_of_layer, weights
from phyla.compression.rule import Rule
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.weights import Weight, materialize
from phyla.training import activations, carried, plots, run
from phyla.training.checkpoints import CODED, Checkpoints
from phyla.training.data.pipeline import prepare
from phyla.training.data.tokenizers import check_match
from phyla.training.divergence import divergences
from phyla.training.progress import Reporter
from phyla.training.saved import Saved, load, make_asker
from phyla.training.speed import measure
from phyla.training.step import split

COMPRESSION = "compression.json"
CONTEXT = 256
"""At which speed is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model: everything is counted, norms and embeddings too."""

    parameters: int
    """Of the dense model that it stands for."""
    zeros: int
    """Of them."""
    bits_per_weight: float
    """Mean over all parameters, of codes and scales alike."""
    bytes_in_memory: int
    bytes_to_load: int
    """At the peak: while an array is read it is there twice."""


def size(model: LanguageModel) -> Size:
    """Counts; no more than one parameter is dense at a time."""
    held = list(weights(model).values())
    parameters = sum(math.prod(each.shape) for each in held)
    nonzero = sum(int(_nonzero(each)) for each in held)
    each = [leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))]
    nbytes = sum(each)
    return Size(
        parameters=parameters,
        zeros=parameters - nonzero,
        bits_per_weight=8 * nbytes / parameters,
        bytes_in_memory=nbytes,
        bytes_to_load=nbytes + max(each),
    )


@jax.jit
def _nonzero(weight: nnx.Param | Weight) -> jax.Array:
    return jnp.count_nonzero(materialize(weight))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text of the methods that read one."""

    source: str | None = None
    """As `data.source`; None: the run's own training text."""
    tokens: int = 65_536
    """At most; whole rows of the run's sequence length."""

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError(f"--tokens must be at least 1, not {self.tokens}")


def compress_run(
    folder: Path,
    recipes: Sequence[Rule],
    out: Path,
    *,
    calibration: Calibration | None = None,
    speed: bool = False,
    validation_tokens: int | None = None,
    json: Path | None = None,
) -> dict[str, Any]:
    """Applies recipes to a run's last checkpoint and writes the result as another run, with figures of what it cost.

    Args:
        folder: the run; it may be compressed already.
        recipes: applied in this order.
        out: a new or empty folder.
        calibration: what recipes read that need text; None: the default.
        speed: whether prefill and decoding are timed, of the model before and after.
        validation_tokens: of the validation text at most so many are read; None: all.
        json: where the figures go; None: compression.json in `out`.

    Returns:
        The figures.

    Raises UserError if the folder is no run, `out` has files, a recipe finds nothing in the model to change, or there
    is no text for those that need it.
    """
    if calibration is not None and not any(recipe.needs_text for recipe in recipes):
        raise UserError(f"{'+'.join(map(str, recipes))} reads no text: leave --calibration and --tokens out")
    calibration = calibration or Calibration()
    run.check_new(out)
    if any(isinstance(recipe, Huffman) for recipe in recipes[:-1]):
        raise UserError(
            f"{'+'.join(map(str, recipes))}: huffman is how the run is written, hence the last; leave it out"
        )
    before = tuple(recipe for recipe in run.read_recipes(folder) if not isinstance(recipe, Huffman))
    abstract(run.read_experiment(folder).model, (*shaping(before), *recipes))  # refuses before anything is computed
    saved = load(folder)
    original = saved.model()
    read: list[dict[str, dict[str, Any]]] = []

    def calibrate(model: LanguageModel, measure: Measure) -> Moments:
        found = _measured(saved, calibration, model, measure)
        if found.columns:
            read.append(activations.activations(found.columns, functools.partial(kind_of_layer, model.config)))
        return found

    steps = compress(original, recipes, calibrate)
    rows = [{"recipe": None} | dataclasses.asdict(size(original))]
    rows += [{"recipe": str(step.recipe)} | dataclasses.asdict(size(step.model)) for step in steps]
    _compare(saved, [original, *(step.model for step in steps)], rows, validation_tokens)
    made = steps[-1].model
    carried.compare(saved, (original, made), (rows[0], rows[-1]), validation_tokens)
    done = (*before, *(rule for step in steps for rule in step.rules))
    experiment = dataclasses.replace(saved.experiment, model=made.config, base=None, recipes="")
    run.create(out, experiment, run.read_record(folder)["tokenizer"], compression=done)
    if saved.own_tokenizer is not None:
        saved.own_tokenizer.save(out / "tokenizer")
    with Checkpoints(out) as checkpoints:
        coded = isinstance(recipes[-1], Huffman)
        sizes = checkpoints.save_params(*split(made)[1:], step=saved.step, coded=coded)
    rows[0]["bytes_on_disk"] = _on_disk(folder, saved.step)
    rows[-1]["bytes_on_disk"] = _on_disk(out, saved.step)
    if speed and not made.config.bidirectional:
        for row, each in ((rows[0], saved), (rows[-1], load(out))):
            row |= _speed(each)
    errors = layer_errors(original, made)
    record = {
        "run": str(folder),
        "step": saved.step,
        "calibration": dataclasses.asdict(calibration) if any(each.needs_text for each in recipes) else None,
        "activations": read[0] if read else None,
        "steps": rows,
        "huffman": {name: each._asdict() for name, each in sizes.items()} or None,
        "coverage": _coverage(made.config, steps),
        "parameters": _parameters(steps),
        "left": _left(steps),
        "notes": [f"{step.recipe}: {step.note}" for step in steps if step.note],
        "errors": errors,
    }
    if errors:
        (out / "errors.png").write_bytes(plots.layer_errors(errors))
    run.write_json(json or out / COMPRESSION, record)
    return record


def rows_beside(original: Saved, other: Saved, validation_tokens: int | None = None) -> list[dict[str, Any]]:
    """The rows of a run and of another that stands beside it, as `compress_run` makes them of a recipe.

    The other may have been trained: distilled, retrained after pruning, quantization-aware.

    Raises UserError if they do not read text alike.
    """
    check_match(original.tokenizer.fingerprint(), other.tokenizer.fingerprint())
    models = [saved.model() for saved in (original, other)]
    rows = [dataclasses.asdict(size(model)) for model in models]
    _compare(original, models, rows, validation_tokens)
    for row, saved in zip(rows, (original, other), strict=True):
        row["bytes_on_disk"] = _on_disk(saved.folder, saved.step)
        if not saved.experiment.model.bidirectional:
            row |= _speed(saved)
    return rows


def _measured(saved: Saved, calibration: Calibration, model: LanguageModel, measure: Measure) -> Moments:
    """Of the rows of the text that have no padding."""
    data = saved.experiment.data
    if calibration.source is not None:
        # a text, also for a run of conversations
        others = {} if data.template is None else {"template": None, "validation": None, "streaming": False}
        data = dataclasses.replace(data, source=calibration.source, **others)
    packed = prepare(data, saved.tokenizer, "train", max_tokens=calibration.tokens)
    (full,) = np.nonzero(np.all(packed.segment_ids != 0, axis=1))
    if not len(full):
        raise UserError(f"{calibration.tokens} tokens fill no row of data.sequence_length {data.sequence_length} + 1")
    rows = min(saved.experiment.loop.batch_size, len(full))
    full = full[: len(full) // rows * rows]
    packed = dataclasses.replace(packed, tokens=packed.tokens[full], segment_ids=packed.segment_ids[full], weights=None)
    ask = make_asker(saved.experiment, saved.tokenizer.mask_id)
    with Reporter() as reporter, reporter.task("calibrate", len(full) // rows, "batches") as task:

        def batches() -> Iterator[tuple[jax.Array, jax.Array]]:
            for i, batch in enumerate(packed.batches(rows)):
                asked = ask(jax.tree.map(jnp.asarray, batch), jax.random.key(i))
                yield asked.tokens, asked.segment_ids
                task.update(i + 1)

        return jax.block_until_ready(measure(model, batches()))


def _compare(saved: Saved, models: list[LanguageModel], rows: list[dict[str, Any]], max_tokens: int | None) -> None:
    """Puts into each row how its model does on the run's validation text; a run without a tokenizer reads none."""
    if saved.own_tokenizer is None:
        return
    packed = prepare(saved.experiment.data, saved.tokenizer, "validation", max_tokens)
    loop = saved.experiment.loop
    ask = make_asker(saved.experiment, saved.tokenizer.mask_id)
    options: dict[str, Any] = {"batch_size": loop.batch_size, "chunk": loop.loss_chunk, "mesh": saved.mesh}
    with (
        Reporter() as reporter,
        reporter.task("evaluate", -(-len(packed.tokens) // loop.batch_size), "batches") as task,
    ):
        found = divergences(models, ask, packed, **options, progress=task.update)
    for row, each in zip(rows, found, strict=True):
        row |= each._asdict()


def _speed(saved: Saved) -> dict[str, float]:
    """Tokens a second of one sequence, at a context of `CONTEXT`."""
    with Reporter() as reporter, reporter.task(f"time {saved.folder}", 1, "contexts") as task:
        found = measure(saved, task.update, (CONTEXT,))
    each = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return {name: found[key][0] for name, key in zip(("prefill", "decode"), each, strict=True) if found[key]}


def layer_errors(before: LanguageModel, after: LanguageModel) -> dict[str, list[float]]:
    """‖W' - W‖ / ‖W‖ of everything that changed, for each layer of its stack; nothing if the model has other shapes."""
    old, found = weights(before), {}
    for path, weight in weights(after).items():
        if path not in old or old[path].shape != weight.shape:
            continue
        error = np.atleast_1d(_error(old[path], weight))
        if error.any():
            found[dotted(path).removeprefix("periods.")] = error.tolist()
    return found


@jax.jit
def _error(before: nnx.Param | Weight, after: nnx.Param | Weight) -> jax.Array:
    """Of each matrix of a stack over layers (experts count together), or of one array."""
    w = materialize(before)
    axes = tuple(range(1, w.ndim)) if w.ndim > 2 else None
    difference = jnp.sum(jnp.square(materialize(after) - w), axis=axes)
    return jnp.sqrt(difference / jnp.maximum(jnp.sum(jnp.square(w), axis=axes), 1e-30))


def _on_disk(folder: Path, step: int) -> int:
    """Of a checkpoint's model alone, without the optimizer's state."""
    items = folder / "checkpoints" / str(step)
    parts = [items / ("ema" if (items / "ema").exists() else "params"), items / "frozen"]
    files = [*(path for part in parts for path in part.rglob("*")), folder / CODED]
    return sum(path.stat().st_size for path in files if path.is_file())


def _parameters(steps: list[Step]) -> dict[str, Any]:
    """What was done to each parameter that was changed and is still there, and the bits that it takes."""
    recipes: dict[str, list[str]] = {}
    for step in steps:
        for name in _whole(steps, step.changed):
            recipes.setdefault(name, []).append(str(step.recipe))
    bits = {dotted(path): _bits(weight) for path, weight in weights(steps[-1].model).items()}
    return {name: {"recipes": done, "bits_per_weight": bits[name]} for name, done in recipes.items()}


def _left(steps: list[Step]) -> dict[str, str]:
    """The parameters that no step changed and that are still there, and why the last one did not."""
    changed = {name for step in steps for name in _whole(steps, step.changed)}
    return {
        name: why
        for step in steps
        for part, why in step.left.items()
        for name in _whole(steps, [part])
        if name not in changed
    }


def _whole(steps: list[Step], names: Iterable[str]) -> dict[str, None]:
    """Of parameters, which may be parts of `Weight`s, what they belong to in the last model."""
    whole = [dotted(path) for path in weights(steps[-1].model)]
    return {each: None for name in names for each in whole if name == each or name.startswith(each + ".")}


def _coverage(config: ModelConfig, steps: list[Step]) -> dict[str, dict[str, float]]:
    """For each kind of layer its parameters, the share of them that was changed, and the mean bits of one."""
    changed = {name for step in steps for name in _whole(steps, step.changed)}
    found: dict[str, dict[str, float]] = {}
    for path, weight in weights(steps[-1].model).items():
        count = math.prod(weight.shape)
        row = found.setdefault(kind_of_layer(config, path), {"parameters": 0, "changed": 0, "bits_per_weight": 0})
        row["parameters"] += count
        row["changed"] += count * (dotted(path) in changed)
        row["bits_per_weight"] += count * _bits(weight)
    for row in found.values():
        row["changed"] /= row["parameters"]
        row["bits_per_weight"] /= row["parameters"]
    return found


def _bits(weight: nnx.Param | Weight) -> float:
    return weight.bits_per_weight if isinstance(weight, Weight) else 8.0 * weight.dtype.itemsize


TABLES = (
    {
        "parameters": ("parameters", "{:,}"),
        "zeros": ("zeros", "{:.1%}"),
        "bits_per_weight": ("bits per weight", "{:.2f}"),
        "bytes_in_memory": ("bytes in memory", "{:,}"),
        "bytes_on_disk": ("on disk", "{:,}"),
    },
    {
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "kl": ("KL from the original", "{:.5f} nats"),
        "agreement": ("same top token", "{:.2%}"),
        "prefill": ("prefill tokens/s", "{:,.0f}"),
        "decode": ("decode tokens/s", "{:,.0f}"),
    },
    carried.TABLE,
)


def show(out: Path, record: dict[str, Any]) -> None:
    """Prints the figures of a run that was made by `compress_run`."""
    console = Console(highlight=False)
    rows = [row | {"zeros": row["zeros"] / row["parameters"]} for row in record["steps"]]
    for columns in TABLES:
        if not columns.keys() & rows[0].keys():
            continue
        table = Table(Column(no_wrap=True), *(Column(title, justify="right") for title, _ in columns.values()))
        for row in rows:
            cells = (form.format(row[name]) if name in row else "" for name, (_, form) in columns.items())
            table.add_row(row["recipe"] or "original", *cells)
        console.print(table)
    titles = ("parameters", "changed", "bits per weight")
    table = Table("", *(Column(title, justify="right") for title in titles))
    for kind, row in record["coverage"].items():
        table.add_row(kind, f"{row['parameters']:,}", f"{row['changed']:.1%}", f"{row['bits_per_weight']:.2f}")
    console.print(table)
    reasons: dict[str, dict[str, None]] = {}
    for name, why in record["left"].items():
        short = re.sub(r"\b\d+\b", "*", name.removeprefix("periods."))
        reasons.setdefault(why, {})[short] = None
    for why, names in reasons.items():
        console.print(f"left alone: {', '.join(names)} ({why})", markup=False, soft_wrap=True)
    for note in record["notes"]:
        console.print(note, markup=False, soft_wrap=True)
    if record["huffman"]:
        raw, coded, entropy = (sum(sizes[name] for sizes in record["huffman"].values()) for name in Sizes._fields)
        console.print(f"huffman: {raw:,} bytes of codes in {coded:,}; their entropy is {entropy:,.0f}")
    before, after = rows[0], rows[-1]
    console.print(f"loading takes {after['bytes_to_load']:,} bytes: the model, and its largest array once more")
    said = f"{before['bytes_in_memory'] / after['bytes_in_memory']:.2f} times smaller in memory"
    if "bits_per_byte" in after:
        said += f", loss {after['bits_per_byte'] / before['bits_per_byte'] - 1:+.2%}"
    if "state_bytes" in after:
        said += f"; state {before['state_bytes'] / after['state_bytes']:.2f} times smaller"
    if "carried_1" in after:
        said += f", loss {after['carried_1'] / before['carried_1'] - 1:+.2%} when it is carried from token to token"
    console.print(f"{out}: {said}", markup=False, soft_wrap=True)
    if record["activations"]:
        console.print(activations.table(record["activations"]))
