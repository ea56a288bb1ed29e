"""The front door: which command, with what, and how it ends."""

import contextlib
import json
import os
import subprocess
import sys
from math import gcd
from pathlib import Path

import pytest

from phyla import __main__, __version__, configs, experiments
from phyla.arguments import parse
from phyla.cli import COMMANDS, main
from phyla.commands import Bench, Compare, Evaluate, Generate, comparison_folder
from phyla.experiments import train_arguments
from phyla.models.errors import UserError


def line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"phyla {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert f"\nexamples:\n  phyla {command}" in capsys.readouterr().out


def test_train_help_lists_experiments_and_fields(capsys):
    main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in configs.EXPERIMENTS)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "transformer", "--help"])
    shown = capsys.readouterr().out
    for option in ("model.pattern.0.mixer.heads INT", "optimizer.learning-rate FLOAT", "max-steps", "data.source STR"):
        assert f"--{option}" in shown
    assert "--name" not in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "phyla: no command 'trian'; nearest: train"),
        (["train"], "phyla train: name an experiment first: transformer"),
        (["train", "--max-steps", "5", "mamba"], "phyla train: name an experiment first: transformer"),
        (["train", "trasformer"], "phyla train: no experiment 'trasformer'; nearest: transformer"),
        (["train", "mamba", "--model.layer", "3"], "phyla train: no option --model.layer; nearest: --model.layers"),
        (
            ["train", "transformer", "--heads", "8"],
            "phyla train: no option --heads; nearest: --model.pattern.0.mixer.heads",
        ),
        (["train", "mamba", "--name", "x"], "phyla train: no option --name"),
        (["train", "mamba", "--loop.microbatches", "3"], "phyla train: loop.microbatches 3 does not divide"),
        (["train", "mamba", "--data.sequence-length", "0"], "phyla train: data.sequence_length must be at least 1"),
        (["compare", "mamba", "trans"], "phyla compare: no experiment 'trans'; nearest: transformer"),
        (["compare", "--seeds", "two"], "phyla compare: --seeds must be an integer, not 'two'"),
        (["evaluate"], "phyla evaluate: RUN must be given"),
        (["distill", "runs/x"], "phyla distill: name a teacher and a student first"),
        (["distill", "runs/x", "mamba"], "phyla distill: runs/x is not a run"),
        (["generate", "runs/x"], "phyla generate: give at least one prompt"),
        (["bench", "scna"], "phyla bench: no {scan,models,kernels} 'scna'; nearest: scan"),
        (["bench", "scan", "mamba"], "phyla bench: bench scan takes no names; bench models does"),
        (["bench", "models", "lama"], "phyla bench: no architecture 'lama'; nearest: llama"),
        (["bench", "models", "--rounds", "0"], "phyla bench: --rounds must be at least 1, not 0"),
    ],
)
def test_a_wrong_line_is_one_line_and_status_2(arguments, expected, capsys):
    assert main(arguments) == 2
    assert line(capsys).startswith(expected)


def test_how_a_command_ends(monkeypatch, capsys):
    def ends_with(error):
        def command(arguments):
            raise error

        monkeypatch.setattr(experiments, "train", command)
        return main(["train", "mamba"])

    assert ends_with(UserError("two\nlines")) == 2
    assert line(capsys) == "phyla train: two lines\n"
    assert ends_with(KeyboardInterrupt()) == 130
    assert line(capsys) == "phyla train: interrupted\n"
    with pytest.raises(ValueError, match="a bug"):
        ends_with(ValueError("a bug"))


def test_train_changes_the_named_experiment():
    arguments = "transformer --model.layers 6 --optimizer.learning-rate 3e-4 --model.pattern.0.mixer.heads 8"
    experiment, out, max_steps = train_arguments([*arguments.split(), "--max-steps", "5", "--out", "o"])
    assert (experiment.name, experiment.model.layers, experiment.optimizer.learning_rate) == ("transformer", 6, 3e-4)
    assert getattr(experiment.model.pattern[0].mixer, "heads", None) == 8
    assert (out, max_steps) == (Path("o"), 5)
    assert train_arguments(["mamba"]) == (configs.experiment("mamba"), None, None)


def test_the_other_commands_read_their_options():
    assert parse(Compare, [], prog="") == Compare(names=configs.SMALL)
    assert parse(Compare, ["mamba", "--seeds", "3", "--budget-minutes", "8"], prog="") == Compare(
        names=("mamba",), seeds=3, budget_minutes=8.0
    )
    assert comparison_folder(configs.SMALL) == Path("runs/compare")
    assert comparison_folder(("mamba", "transformer")) == Path("runs/compare-mamba-transformer")
    assert parse(Evaluate, ["r", "--data", "a.txt"], prog="") == Evaluate(run=Path("r"), data="a.txt")
    assert parse(Generate, ["r", "--prompt", "a", "--prompt", "b", "--stop", ".", "--top-k", "3"], prog="") == Generate(
        run=Path("r"), prompt=("a", "b"), stop=(".",), top_k=3
    )
    assert parse(Bench, ["scan", "--json", "x"], prog="") == Bench(what="scan", json=Path("x"))
    assert parse(Bench, ["models", "llama", "gpt2", "--peers", "p", "--rounds", "3"], prog="") == Bench(
        what="models", names=("llama", "gpt2"), peers=Path("p"), rounds=3
    )


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def test_what_needs_no_jax_imports_no_jax():
    code = """
import json, sys, time
start = time.perf_counter()
from phyla.cli import main
for arguments in (["--help"], ["--version"], ["trian"], []):
    main(arguments)
print(json.dumps([time.perf_counter() - start, [m for m in ("jax", "tyro", "numpy", "rich") if m in sys.modules]]))
"""
    seconds, heavy = json.loads(python(code))
    assert heavy == []
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, gcd(6, getattr(os, "process_cpu_count", os.cpu_count)() or 1)),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
        ({"JAX_NUM_CPU_DEVICES": "5"}, 5),
    ],
)
def test_use_all_cores(environment, devices):
    code = "from phyla.cores import use_all_cores; use_all_cores(6); import jax; print(jax.device_count('cpu'))"
    assert python(code, **environment) == str(devices)


@pytest.mark.parametrize(
    ("files", "chosen", "platforms"), [((), None, "cpu"), (("nvidia0",), None, None), ((), "cuda,cpu", "cuda,cpu")]
)
def test_jax_looks_for_no_chip_where_there_is_none(files, chosen, platforms, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(__main__, "CHIPS", (f"{tmp_path}/accel*", f"{tmp_path}/nvidia*"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if chosen:
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
    __main__.look_for_no_chip()
    assert os.environ.get("JAX_PLATFORMS") == platforms


@pytest.mark.skipif(sys.platform != "linux", reason="GLIBC_TUNABLES is glibc's")
@pytest.mark.parametrize("chosen", [None, "glibc.malloc.hugetlb=0"])
def test_the_process_gets_huge_pages_unless_the_user_decides(chosen, tmp_path):
    """The command replaces its process with itself, once, and keeps its arguments."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nprint(os.environ.get('GLIBC_TUNABLES'), sys.orig_argv[-2:], flush=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(tmp_path)} | ({"GLIBC_TUNABLES": chosen} if chosen else {})
    command = [sys.executable, "-m", "phyla", "train", "transformr"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    settings = [None, "glibc.malloc.hugetlb=1"] if chosen is None else [chosen]
    assert done.stdout.splitlines() == [f"{each} ['train', 'transformr']" for each in settings]


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m phyla train transformer --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")
