"""The loop as a user meets it: exact resume after a kill, clean stops, honest refusals."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from phyla.models import sizes
from phyla.models.errors import Diverged, UserError
from phyla.models.serialization import to_json
from phyla.training import log, machine, run, sharding
from phyla.training.checkpoints import Checkpoints, with_shardings
from phyla.training.config import MeshConfig
from phyla.training.data.pipeline import train_iterator
from phyla.training.data.tokenizers import ByteTokenizer
from phyla.training.loop import train
from phyla.training.progress import Reporter
from phyla.training.saved import load

PROGRAM = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[4])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_disable_most_optimizations", True)
import json
from phyla.models.serialization import from_json
from phyla.training.config import Experiment
from phyla.training.loop import train
train(from_json(Experiment, json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), max_steps=int(sys.argv[3]))
print("ended", flush=True)
"""


def start(experiment, folder, tmp_path, max_steps):
    """Trains in a process of its own."""
    config = tmp_path / "experiment.json"
    run.write_json(config, to_json(experiment))
    cache = str(jax.config.jax_compilation_cache_dir)
    arguments = [sys.executable, "-c", PROGRAM, str(config), str(folder), str(max_steps), cache]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})


def wait_for_step(process, folder, step):
    """Until metrics.jsonl has the step's line."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in log.read(folder)):
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


def curve(folder):
    """What must not differ between two runs."""
    wanted = ("step", "loss", "bits_per_byte", "gradient_norm", "tokens", "validation_bits_per_byte")
    return [{name: line[name] for name in wanted if name in line} for line in log.read(folder)]


def same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, load(a).params, load(b).params)


def test_killed_and_resumed_equals_uninterrupted(experiment, tmp_path):
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=4, fsdp=2))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(experiment, straight)

    process = start(experiment, killed, tmp_path, max_steps=40)
    wait_for_step(process, killed, 23)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(curve(killed)) < len(curve(straight))

    # What a crash in the middle of writing a checkpoint or a line leaves behind.
    (killed / "checkpoints" / "99.orbax-checkpoint-tmp-1" / "params").mkdir(parents=True)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')

    train(experiment, killed)
    assert curve(killed) == curve(straight)
    same_parameters(killed, straight)


def test_a_stop_after_some_steps_is_the_same_run(experiment, tmp_path):
    assert train(experiment, tmp_path / "parts", max_steps=20) is None
    assert train(experiment, tmp_path / "parts", max_steps=15) is None  # already further
    summary = train(experiment, tmp_path / "parts")
    whole = train(experiment, tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same_parameters(tmp_path / "parts", tmp_path / "whole")
    assert summary is not None
    assert whole is not None
    assert summary["bits_per_byte"] == whole["bits_per_byte"]
    assert train(experiment, tmp_path / "whole") == whole  # finished: nothing is run again


def test_sigterm_finishes_the_step_saves_and_exits_with_0(experiment, tmp_path):
    experiment = dataclasses.replace(
        experiment, loop=dataclasses.replace(experiment.loop, steps=100_000, eval_every=50_000, checkpoint_every=50_000)
    )
    folder = tmp_path / "run"
    process = start(experiment, folder, tmp_path, max_steps=100_000)
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "ended" in output
    assert load(folder).step == log.read(folder)[-1]["step"] > 3


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(experiment, tmp_path):
    folder = tmp_path / "run"
    steps = dataclasses.replace(experiment.loop, max_skipped=3, checkpoint_every=5)
    experiment = dataclasses.replace(experiment, loop=steps)
    train(experiment, folder, max_steps=10)
    good = load(folder)

    # From here on every gradient is infinite.
    checkpoint = folder / "checkpoints" / "10" / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(checkpoint)
        params["norm"] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["norm"])
        checkpointer.save(checkpoint, params, force=True)
    with pytest.raises(Diverged, match="3 non-finite updates in a row at step 13"):
        train(experiment, folder)
    assert load(folder).step == 10
    assert good.step == 10
    assert [line["skipped"] for line in log.read(folder) if line["step"] in (11, 12) and "skipped" in line] == [1, 2]


def test_a_checkpoint_restores_on_another_mesh(experiment, tmp_path):
    folder = tmp_path / "run"
    before = dataclasses.replace(experiment, mesh=MeshConfig(data=2, fsdp=4))
    train(before, folder, max_steps=10)
    after = dataclasses.replace(experiment, mesh=MeshConfig(data=8))
    assert run.config_hash(before) == run.config_hash(after)
    train(after, folder, max_steps=20)
    train(experiment, tmp_path / "one", max_steps=20)
    a, b = (log.read(path)[-1]["validation_bits_per_byte"] for path in (folder, tmp_path / "one"))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert run.read_experiment(folder).mesh == after.mesh


def test_the_latest_and_the_best_checkpoints_are_kept(experiment, tmp_path):
    keep = dataclasses.replace(experiment.loop, eval_every=5, checkpoint_every=5, keep=1)
    # A learning rate that spoils what it had learned: the best checkpoint is an early one.
    wild = dataclasses.replace(experiment.optimizer, learning_rate=3.0, schedule="constant", warmup_fraction=1.0)
    folder = tmp_path / "run"
    train(dataclasses.replace(experiment, loop=keep, optimizer=wild), folder)
    scores = {line["step"]: line["validation_bits_per_byte"] for line in log.read(folder) if "whole_text" in line}
    best = min(scores, key=lambda step: scores[step])
    assert best < 40, scores
    kept = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert kept == {best, 40}


def test_the_run_directory_says_what_was_run(experiment, tmp_path):
    train(experiment, tmp_path / "run", max_steps=1)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["hash"] == run.config_hash(run.read_experiment(tmp_path / "run"))
    assert record["versions"]["jax"] == jax.__version__
    assert record["tokenizer"]["vocab_size"] == 257
    assert "git" in record
    assert run.read_experiment(tmp_path / "run") == run.with_vocabulary(experiment, ByteTokenizer())


def test_a_trained_tokenizer_and_tensorboard_belong_to_the_run(experiment, tmp_path):
    data = dataclasses.replace(experiment.data, tokenizer="bpe:280")
    experiment = dataclasses.replace(
        experiment, data=data, loop=dataclasses.replace(experiment.loop, tensorboard=True, steps=10)
    )
    summary = train(experiment, tmp_path / "run")
    assert summary is not None
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    saved = load(tmp_path / "run")
    assert saved.tokenizer.decode(saved.tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    assert saved.experiment.model.vocab_size == saved.tokenizer.vocab_size == 280
    # Nats are per token and bits per byte of text: a token is several bytes.
    bits = summary["bits_per_byte"] / summary["nats_per_token"]
    assert bits < 1 / np.log(2)
    line = next(line for line in log.read(tmp_path / "run") if "loss" in line)
    np.testing.assert_allclose(line["bits_per_byte"] / line["loss"], bits)
    # A step is one pass forward and one, twice as costly, backward.
    operations = 3 * sizes.flops_per_token(saved.experiment.model, 16) * line["tokens_per_second"]
    np.testing.assert_allclose(line["flops_utilisation"], operations / machine.matmul_peak(saved.mesh, "float32"))


def test_another_experiment_in_the_same_folder_is_refused(experiment, tmp_path):
    train(experiment, tmp_path / "run", max_steps=1)
    other = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, learning_rate=0.5))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate = 0\.01, not 0\.5"):
        train(other, tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        train(experiment, tmp_path / "full")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("mesh", {"data": 16}, "16 devices, but there are 8"),
        ("model", {"width": 15}, r"attention\.heads 2 does not divide model\.width 15; nearest: 1"),
        ("model", {"vocab_size": 100}, r"model\.vocab_size 100 is smaller than the tokenizer's; nearest: 257"),
        ("data", {"source": "nowhere/*.txt"}, "nowhere"),
    ],
)
def test_impossible_experiments_are_refused_before_anything_is_written(experiment, tmp_path, section, change, message):
    broken = dataclasses.replace(experiment, **{section: dataclasses.replace(getattr(experiment, section), **change)})
    with pytest.raises(UserError, match=message):
        train(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_runs_is_refused(experiment, tmp_path):
    train(experiment, tmp_path / "run", max_steps=1)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["tokenizer"]["sha256"] = "0" * 64
    run.write_json(tmp_path / "run" / "config.json", record)
    with pytest.raises(UserError, match="tokenizer is not the one of this run"):
        load(tmp_path / "run")


def test_a_checkpoint_holds_everything_that_changes(experiment, setup, batch, tmp_path):
    step, state, _, _ = setup(experiment, ema=0.5)
    state, _ = step(state, batch)
    integers = jnp.arange(2, 6)
    state = state._replace(skipped=integers[0], skipped_in_a_row=integers[1], key=integers[2:].astype(jnp.uint32))

    def iterator():
        return train_iterator(experiment.data, ByteTokenizer(), batch_size=4, seed=0)

    data = iterator()
    for _ in range(3):
        next(data)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(state, data, {"tokens": 7, "seconds": 1.5}, None)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), 8)
    abstract = jax.eval_shape(lambda: state)
    moved = iterator()
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() == 1
        wanted = with_shardings(abstract, sharding.shardings(abstract, mesh))
        found, progress = checkpoints.restore(1, wanted, moved)
    jax.tree.map(np.testing.assert_array_equal, state, found)
    assert progress == {"tokens": 7, "seconds": 1.5}
    np.testing.assert_array_equal(next(data)["tokens"], next(moved)["tokens"])


def test_a_checkpoint_without_a_validation_is_never_the_best(experiment, setup, tmp_path):
    _, state, _, _ = setup(experiment)
    data = train_iterator(experiment.data, ByteTokenizer(), batch_size=4, seed=0)
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        for step, bits in ((1, 2.0), (2, None), (3, 3.0)):
            checkpoints.save(state._replace(step=jnp.asarray(step)), data, {}, bits)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"1", "3"}


class Interrupter(Reporter):
    """Sends this process a signal once the run introduces itself."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def note(self, text):
        if " parameters (" in text:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_saves(experiment, tmp_path, number):
    def unheard(number, frame):
        raise AssertionError("the loop does not listen")

    ends = pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext()
    before = signal.signal(number, unheard)
    try:
        with ends:
            assert train(experiment, tmp_path / "run", reporter=Interrupter(number)) is None
        assert signal.getsignal(number) is unheard
    finally:
        signal.signal(number, before)
    assert load(tmp_path / "run").step == 1


def test_every_field_but_the_mesh_makes_another_run(experiment):
    whole = to_json(experiment)
    kept = run.identity(whole).keys()
    assert run.flatten(whole).keys() - kept == {f"mesh.{name}" for name in whole["mesh"]}
    assert kept > {"model.width", "model.pattern.1.mixer.state", "data.source", "optimizer.beta1", "loop.seed"}
    assert run.identity(whole)["loop.seed"] == 0


def test_the_clock_stands_still_while_training_pauses(tmp_path):
    options = {"bytes_per_token": 1.0, "flops_per_token": 1.0, "peak_flops": 1.0, "tensorboard": False}
    clock = log.Log(tmp_path, 0, tokens=0, seconds=5.0, **options)
    began = time.perf_counter()
    time.sleep(0.1)
    with clock.paused():
        time.sleep(0.2)
    assert 5.1 <= clock.seconds <= 5.0 + time.perf_counter() - began - 0.1
