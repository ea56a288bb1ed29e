"""The loop: everything from an experiment to a trained run, readable top to bottom."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from phyla.models import sizes
from phyla.models.errors import Diverged, UserError
from phyla.training import machine, run, sharding
from phyla.training.checkpoints import Checkpoints, with_shardings
from phyla.training.config import Experiment
from phyla.training.data.pipeline import Packed, prepare, train_iterator
from phyla.training.distillation import make_distillation
from phyla.training.evaluate import Score, make_evaluate, score
from phyla.training.lessons import make_lessons
from phyla.training.log import Log
from phyla.training.optimizer import make_optimizer, schedule
from phyla.training.progress import Reporter
from phyla.training.saved import make_objective
from phyla.training.sparse import sparse
from phyla.training.start import start, what_is_trained
from phyla.training.step import NOTHING, Metrics, TrainState, compile_step, initial_state, make_step, split

SUMMARY = "summary.json"


def train(
    experiment: Experiment, folder: Path, *, max_steps: int | None = None, reporter: Reporter | None = None
) -> dict[str, Any] | None:
    """Trains an experiment into a run directory, or continues what is there.

    Args:
        experiment: what to train.
        folder: the run directory.
        max_steps: stop after this many steps in all; the schedule is still that of `loop.steps`.
        reporter: where progress goes; a new one on standard error if None.

    Returns:
        What summary.json says once `loop.steps` are done; None before.

    Raises UserError, before anything is compiled or written, if the experiment contradicts itself, the machine, the
    data or the folder; Diverged after `loop.max_skipped` non-finite updates in a row.
    """
    config = experiment.loop

    # Whatever can be wrong is found here.
    if max_steps is not None and max_steps < 1:
        raise UserError(f"--max-steps must be at least 1, not {max_steps}")
    mesh = sharding.make_mesh(experiment.mesh, config.batch_size // config.microbatches)
    begins = start(experiment)
    tokenizer = begins.tokenizer()
    experiment = run.with_vocabulary(begins.experiment, tokenizer)
    begins = begins._replace(experiment=experiment)
    model = begins.abstract()
    graphdef, abstract_params, abstract_frozen = split(model)
    measured = make_objective(experiment, tokenizer.mask_id)
    objective, flops_per_token = measured, 3 * sizes.flops_per_token(experiment.model, experiment.data.sequence_length)
    lessons = None
    if begins.teacher is not None:
        teacher = begins.teacher.model()
        objective = make_distillation(experiment, teacher, tokenizer.mask_id)
        lessons = make_lessons(experiment, begins.teacher, tokenizer)
        if lessons is None:
            flops_per_token += sizes.flops_per_token(teacher.config, experiment.data.sequence_length)
    _, own, own_frozen = split(objective)
    validation = prepare(experiment.data, tokenizer, "validation")
    notes = [validation.note] if validation.note else []
    glance = prepare(experiment.data, tokenizer, "validation", config.eval_tokens) if config.eval_tokens else validation
    data = train_iterator(
        experiment.data,
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        note=notes.append,
        beside=None if lessons is None else lessons.of,
    )

    # From here on the run exists.
    run.create(folder, experiment, tokenizer.fingerprint(), compression=begins.recipes)
    if (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    tokenizer.save(folder / "tokenizer")
    rows = validation.rows
    if lessons is not None:
        lessons.fill(mesh, reporter)
        rows = rows | lessons.rows(np.zeros(1, int))
    optimizer = sparse(
        make_optimizer(experiment.optimizer, config.steps, (abstract_params, own)),
        experiment.sparsity,
        steps=config.steps,
        rate=schedule(experiment.optimizer, config.steps),
        model=experiment.model,
        pruned=begins.pruned,
    )

    def init(params: nnx.State, own: nnx.State) -> TrainState:
        return initial_state(params, optimizer, config, own)

    abstract = jax.eval_shape(init, abstract_params, own)._replace(frozen=(abstract_frozen, own_frozen))
    layout = sharding.shardings(abstract, mesh)
    last = min(config.steps, max_steps or config.steps)

    with (
        contextlib.nullcontext(reporter) if reporter else Reporter() as reporter,
        Checkpoints(folder, config.keep, frozen=not begins.derived) as checkpoints,
        reporter.task(experiment.name, last, "steps") as task,
        stop_requests() as stop,
    ):
        for note in notes:
            reporter.note(f"{experiment.name}: {note}")
        begin = checkpoints.latest() or 0
        if begin >= last < config.steps:
            reporter.note(f"{experiment.name}: {folder} is at step {begin:,} already")
            return None
        if begin:
            state, progress = checkpoints.restore(begin, with_shardings(abstract, layout), data)
            frozen = begins.make(layout.params, layout.frozen[0])[1] if begins.derived else state.frozen[0]
            reporter.note(f"{experiment.name}: continues {folder} from step {begin:,}")
        else:
            params, frozen = begins.make(layout.params, layout.frozen[0], reporter.note)
            empty = layout._replace(frozen=(NOTHING, NOTHING))
            state = jax.jit(init, donate_argnums=0, out_shardings=empty)(params, own)
            progress = {"tokens": 0, "seconds": 0.0}
        state = state._replace(frozen=(frozen, jax.device_put(own_frozen, layout.frozen[1])))

        task.update(begin, "compiling")
        step = make_step(graphdef, objective, optimizer, config)
        batch = sharding.abstract_batch(config.batch_size, rows, mesh)
        compiled = compile_step(step, state, batch, layout, mesh)
        sums = make_evaluate(graphdef, measured)
        reporter.note(_introduction(experiment, folder, mesh, abstract_params))
        if said := what_is_trained(model, experiment.optimizer):
            reporter.note(f"{experiment.name}: {said}")
        log = Log(
            folder,
            begin,
            **progress,
            bytes_per_token=validation.bytes_per_token,
            flops_per_token=flops_per_token,
            peak_flops=machine.matmul_peak(mesh, experiment.model.dtype),
            tensorboard=config.tensorboard,
        )

        def validate(number: int, text: Packed) -> Score:
            task.update(number, f"validating on {text.num_tokens:,} tokens")
            params = nnx.merge_state(state.params if state.ema is None else state.ema, state.frozen[0])
            result = score(sums, params, text, config.batch_size, mesh)
            log.validation(number, result.bits_per_byte, result.nats_per_token, whole=text is validation)
            reporter.note(f"{experiment.name} step {number:,}: {result.bits_per_byte:.4f} bits per byte on validation")
            return result

        def save(result: Score | None) -> None:
            progress = {"tokens": log.tokens, "seconds": log.seconds}
            checkpoints.save(state, data, progress, None if result is None else result.bits_per_byte)

        number, late, result, stopping = begin, None, None, False
        while number < last and not stopping:
            state, metrics = compiled(state, sharding.put_batch(next(data), mesh))
            number += 1

            # Metrics are fetched one step late, so that the devices never wait for the host, except where
            # training pauses anyway.
            stopping = stop.signal is not None
            if stopping:
                task.update(number, "stopping: saves first")
            validates, saves = number % config.eval_every == 0, number % config.checkpoint_every == 0
            validates &= number < config.steps or glance is not validation  # the whole text is read at the end
            pauses = validates or saves or number == last or stopping
            due = [(number - 1, late)] if late is not None else []
            late = metrics
            if pauses:
                due.append((number, metrics))
                late = None
            for then, on_device in due:
                found: Metrics = jax.device_get(on_device)
                log.count(found)
                if found.skipped_in_a_row >= config.max_skipped:
                    raise Diverged(_diverged(found, then, folder))
                if then % config.log_every == 0 or then == last:
                    line = log.train(then, found)
                    task.update(then, f"loss {line['loss']:.3f} · {line['tokens_per_second']:,.0f} tokens/s")

            if pauses:
                with log.paused():
                    result = validate(number, glance) if validates else None
                    if number < config.steps:
                        save(result)

        if number == config.steps:
            with log.paused():
                result = validate(number, validation)
                if number > begin:
                    save(result)

    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if number < config.steps or result is None:
        return None
    summary = {
        "name": experiment.name,
        "steps": config.steps,
        "tokens": log.tokens,
        "seconds": log.seconds,
        "tokens_per_second": log.tokens / log.seconds,
        "flops_utilisation": log.utilisation(log.tokens / log.seconds),
        "parameters": sizes.count(experiment.model),
        "peak_memory_bytes": machine.peak_memory(compiled),
        "bits_per_byte": result.bits_per_byte,
        "nats_per_token": result.nats_per_token,
        "skipped_updates": int(state.skipped),
        "device": machine.description(mesh),
    }
    run.write_json(folder / SUMMARY, summary)
    return summary


class Stop:
    """Which signal asked the loop to stop, if any."""

    signal: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """SIGTERM and the first Ctrl-C are noted: the loop finishes its step, saves and stops. A second Ctrl-C kills.

    In a job of several processes SIGTERM is left alone: they would stop at different steps.
    """
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        stop.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGINT) if in_main_thread and jax.process_count() == 1 else ()
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _introduction(experiment: Experiment, folder: Path, mesh: Mesh, params: nnx.State) -> str:
    model, config = experiment.model, experiment.loop
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    undivided = sharding.replicated_dimensions(params, mesh)
    note = f" ({undivided} parameters replicated along an axis that does not divide them)" if undivided else ""
    return (
        f"{experiment.name}: {sizes.count(model):,} parameters (width {model.width}, {model.layers} layers), "
        f"{config.steps:,} steps of {config.batch_size} × {experiment.data.sequence_length} tokens "
        f"on {machine.description(mesh)}, mesh {axes}{note} → {folder}"
    )


def _diverged(metrics: Metrics, step: int, folder: Path) -> str:
    return (
        f"{int(metrics.skipped_in_a_row)} non-finite updates in a row at step {step}: stopped; {folder} keeps the "
        "checkpoints from before. A lower optimizer.learning_rate may help"
    )
