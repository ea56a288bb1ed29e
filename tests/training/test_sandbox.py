"""Programs that mean harm: each limit stops its kind, and the parent only ever gets an outcome.

What the kernel enforces is tested without the audit hook, and the hook without the kernel's isolation.
"""

import os
import sys

import pytest

from phyla.training import sandbox
from phyla.training.sandbox import MEGABYTE, Limits, run_python

PATIENT = Limits(seconds=60)


def without(monkeypatch, *lines: str) -> None:
    """Takes lines out of what the child runs before the program."""
    for line in lines:
        assert line in sandbox._BOOTSTRAP
        monkeypatch.setattr(sandbox, "_BOOTSTRAP", sandbox._BOOTSTRAP.replace(line, "pass"))


@pytest.fixture
def only_kernel(monkeypatch):
    """No hook, and every module can be imported (loaded before the files are gone)."""
    without(monkeypatch, "sys.addaudithook(refuse)", "sys.modules[name] = None")
    monkeypatch.setattr(sandbox, "_BOOTSTRAP", "import socket, subprocess, threading\n" + sandbox._BOOTSTRAP)


@pytest.fixture
def only_hook(monkeypatch):
    """No namespaces and no chroot."""
    without(monkeypatch, 'may(lambda: os.unshare(os.CLONE_NEWNET), "network")', 'may(lambda: os.chroot("."), "files")')


def test_a_program_prints_its_answer():
    outcome = run_python("import math\nn = 37\nn = n + 58\nprint(n, math.gcd(12, 18))")
    assert (outcome.status, outcome.exit_status, outcome.output, outcome.errors) == ("done", 0, "95 6\n", "")
    classes = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))"
    assert run_python(classes).output == "A(x=1)\n"


@pytest.mark.parametrize(
    ("program", "exit_status", "errors"),
    [
        ("print(1)\n1 / 0", 1, "line 2: ZeroDivisionError: division by zero\n"),
        ("raise SystemExit(3)", 3, ""),
        ("print((", 1, "SyntaxError: '(' was never closed (<program>, line 1)\n"),
        ("a\0b", 1, "SyntaxError: source code string cannot contain null bytes\n"),
        ("'\ud800'", 1, None),
        ("input()", 1, "line 1: EOFError: EOF when reading a line\n"),
        ("import numpy", 1, "line 1: ModuleNotFoundError: no module numpy here\n"),
        ("def f(): f()\nf()", 1, "line 2: RecursionError: maximum recursion depth exceeded\n"),
    ],
)
def test_a_program_that_fails_is_an_outcome(program, exit_status, errors):
    outcome = run_python(program)
    assert (outcome.status, outcome.exit_status) == ("failed", exit_status)
    assert errors is None or outcome.errors == errors


def test_endless_computation_ends_by_its_cpu_time():
    outcome = run_python("while True: pass", Limits(cpu_seconds=1, seconds=60))
    assert (outcome.status, outcome.exit_status) == ("failed", -9)


@pytest.mark.parametrize("program", ["import time\ntime.sleep(1000)", "print(end='x', flush=True)\nwhile True: pass"])
def test_waiting_ends_by_the_clock(program):
    outcome = run_python(program, Limits(cpu_seconds=100, seconds=1.0))
    assert (outcome.status, outcome.exit_status) == ("timeout", -9)


def test_memory_is_bounded(only_kernel):
    outcome = run_python("x = []\nwhile True: x.append(bytearray(10_000_000))", PATIENT)
    assert (outcome.status, outcome.errors) == ("failed", "line 2: MemoryError: \n")
    enough = Limits(seconds=60, memory=600 * MEGABYTE)
    assert run_python("print(len(bytearray(300_000_000)))", enough).output == "300000000\n"
    assert run_python("print(len(bytearray(300_000_000)))", PATIENT).status == "failed"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(stream):
    limits = Limits(seconds=60, output=1000)
    outcome = run_python(f"import sys\nwhile True: print('x' * 500, file=sys.{stream})", limits)
    assert outcome.status == "too much output"
    assert len(outcome.output) <= 1000
    assert len(outcome.errors) <= 1000


HARMFUL = {
    "write": "open('found.txt', 'w').write('x')",
    "read": "print(open({home!r}).read())",
    "list": "print(random._os.listdir({folder!r}))",
    "remove": "random._os.remove({home!r})",
    "fork": "random._os.fork()",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)",
    "command": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo'])",
    "thread": "import threading\nthreading.Thread(target=print).start()",
}


@pytest.fixture
def harm(tmp_path):
    """A function: runs a harmful program against a file and a listening socket; nothing may have come of it."""
    import socket

    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    os.chmod(tmp_path, 0o777)
    os.chmod(secret, 0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)

        def run(name):
            names = {"home": str(secret), "folder": str(tmp_path), "port": server.getsockname()[1]}
            outcome = run_python("import random\n" + HARMFUL[name].format(**names), PATIENT)
            assert outcome.status == "failed", outcome
            assert "secret" not in outcome.output
            assert secret.read_text() == "secret"
            with pytest.raises(BlockingIOError):
                server.accept()
            return outcome

        yield run


@pytest.mark.parametrize("name", HARMFUL)
def test_harm_is_stopped_by_the_hook_alone(name, harm, only_hook):
    outcome = harm(name)
    assert outcome.isolated == ()
    assert "not allowed" in outcome.errors or "no module" in outcome.errors


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces and chroot are Linux's")
@pytest.mark.parametrize("name", HARMFUL)
def test_harm_is_stopped_by_the_kernel_alone(name, harm, only_kernel):
    probe = run_python("").isolated
    if name in ("write", "read", "list", "remove", "command") and "files" not in probe:
        pytest.skip("this system allows no chroot")
    if name == "connect" and "network" not in probe:
        pytest.skip("this system allows no network namespace")
    outcome = harm(name)
    assert "not allowed" not in outcome.errors
    assert "no module" not in outcome.errors


def test_root_and_its_capabilities_are_given_up(only_kernel):
    program = "import os\nprint(os.getuid() != 0)\nos.chroot('/')"
    outcome = run_python(program)
    assert outcome.output == "True\n"
    assert "Operation not permitted" in outcome.errors


def test_a_limit_cannot_be_raised(only_kernel):
    outcome = run_python("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (100, 100))")
    assert "not allowed to raise maximum limit" in outcome.errors


@pytest.mark.parametrize(
    "program",
    [
        "import __main__\n__main__.refuse = None\nopen('/etc/passwd')",
        "import builtins\nbuiltins.PermissionError = print\nopen('/etc/passwd')",
        "def f(): pass\nf.__code__ = f.__code__",
        "def f(): pass\nf.__code__.replace(co_consts=())",
        "import random\nrandom._os.kill(random._os.getppid(), 9)",
    ],
)
def test_the_hook_stays(program, only_hook):
    outcome = run_python(program)
    assert outcome.status == "failed"
    assert outcome.errors


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    for program in ("print(1)", "while True: print('x' * 1000)"):
        run_python(program)
    assert list(tmp_path.iterdir()) == []
