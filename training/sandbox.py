"""Python that a model wrote, run in a process of its own with limits.

What the kernel enforces on Linux, from the moment the program's first line runs:

- CPU seconds, address space, no file may grow, 16 open files, no core dump; no new process or thread (`setrlimit`, hard
  limits).
- No network but an empty one (a network namespace), and no files but an empty folder (`chroot`), both where the kernel
  allows them: to root, and to other users where user namespaces are open to them. Root becomes nobody, and all
  capabilities are given up. `Outcome.isolated` says which of the two held.

What only Python enforces, through an audit hook that cannot be removed: no sockets, processes, signals, files or
ctypes, and no module but some of the standard library. It stops programs that mean no harm, such as what a language
model writes. Code written to break an interpreter may get around it, and then it can signal the user's processes (not
root's) and, where namespaces are not allowed, use the network and read and delete what the user can. Elsewhere than on
Linux only the limits and the hook remain.

The parent kills the process group at the wall-clock limit, and as soon as the output is too long.
"""

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

MEGABYTE = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program."""

    cpu_seconds: int = 2
    """Of computation."""
    seconds: float = 10.0
    """From start to end."""
    memory: int = 256 * MEGABYTE
    """Bytes of address space, the interpreter's included."""
    output: int = 64 * 1024
    """Bytes of output and of errors, each."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program."""

    status: Literal["done", "failed", "timeout", "too much output"]
    """failed: an exception, a limit of the kernel, or another exit status than 0."""
    exit_status: int
    """Of the process; -N: ended by signal N."""
    output: str
    """Of standard output, cut off at the limit."""
    errors: str
    """Of standard error, cut off at the limit."""
    isolated: tuple[str, ...]
    """Which of "network" and "files" the kernel kept from it."""


def run_python(program: str, limits: Limits | None = None) -> Outcome:
    """Runs a program under limits. Whatever it does comes back as an outcome, never as an exception.

    Args:
        program: Python; it may import what is harmless of the standard library (see `_BOOTSTRAP`).
        limits: None: the defaults.
    """
    limits = limits or Limits()
    settings = f"{limits.cpu_seconds} {limits.memory}"
    with tempfile.TemporaryDirectory(prefix="phyla-sandbox-") as folder:
        os.chmod(folder, 0o555)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            status, output, errors = _talk(process, program.encode("utf-8", "surrogatepass"), limits)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    isolated, _, output = output.partition(b"\n")  # the first line is the bootstrap's
    if status == "done" and process.returncode != 0:
        status = "failed"
    return Outcome(
        status=status,
        exit_status=process.returncode,
        output=output.decode("utf-8", "replace"),
        errors=errors.decode("utf-8", "replace"),
        isolated=tuple(isolated.decode("utf-8", "replace").split()),
    )


def _talk(
    process: subprocess.Popen[bytes], program: bytes, limits: Limits
) -> tuple[Literal["done", "timeout", "too much output"], bytes, bytes]:
    """Sends the program and reads both outputs until the process closes them, or breaks a limit."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + limits.seconds
    found = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    with selectors.DefaultSelector() as selector, process.stdin, process.stdout, process.stderr:
        for pipe in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for number in found:
            selector.register(number, selectors.EVENT_READ)
        status = "done"
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                status = "timeout"
                break
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    try:
                        program = program[os.write(key.fd, program) :] if program else program
                    except BrokenPipeError:
                        program = b""
                    if not program:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif chunk := os.read(key.fd, 65_536):
                    found[key.fd] += chunk
                else:
                    selector.unregister(key.fd)
            if max(map(len, found.values())) > limits.output:
                status = "too much output"
                break
        output, errors = (text[: limits.output] for text in found.values())
        if status == "done":  # its outputs are closed, but it may live on
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = "timeout"
        return status, output, errors


# What the child runs. What the program may import is loaded first: an import that is not is refused, and finds no file.
# The hook keeps what it forbids in its code, where the program cannot change it.
_BOOTSTRAP = r"""
import __future__, _strptime, abc, bisect, calendar, cmath, collections, contextlib, copy, ctypes, dataclasses, datetime
import decimal, enum, fractions, functools, heapq, itertools, json, math, numbers, operator, os, random, re, resource
import statistics, string, sys, textwrap, time, typing

cpu_seconds, memory = map(int, sys.argv[1].split())
program = sys.stdin.buffer.read()
isolated = []


def may(action, name=None):
    try:
        action()
    except (OSError, ValueError, AttributeError):  # not allowed here, or not on this system
        return False
    if name:
        isolated.append(name)
    return True


root = os.geteuid() == 0
if root or may(lambda: os.unshare(os.CLONE_NEWUSER)):
    may(lambda: os.unshare(os.CLONE_NEWNET), "network")
    may(lambda: os.chroot("."), "files")
if root:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):  # version 3, this process; none
        sys.exit("capabilities cannot be given up")
for which, most in (("CPU", cpu_seconds), ("FSIZE", 0), ("NOFILE", 16), ("CORE", 0), ("NPROC", 0), ("AS", memory)):
    held = may(lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{which}"), (most, most)))
    if not held and (which != "AS" or sys.platform == "linux"):  # macOS cannot limit the address space
        sys.exit(f"RLIMIT_{which} cannot be set")
print(*isolated, flush=True)


def refuse(event, arguments):
    if event == "import":
        raise ModuleNotFoundError(f"no module {arguments[0]} here")
    if event.startswith(
        ("open", "os.", "socket.", "subprocess.", "shutil.", "ctypes.", "mmap.", "signal.", "fcntl.", "pty.", "code.")
        + ("resource.", "_thread.", "_posixsubprocess.", "gc.", "marshal.", "sys.set")
    ) or (event == "object.__setattr__" and arguments[1] == "__code__"):
        raise PermissionError(f"{event} is not allowed")


for name in ("os", "posix", "ctypes", "_ctypes", "resource", "socket", "_socket", "subprocess", "signal", "gc"):
    sys.modules[name] = None
sys.addaudithook(refuse)
del ctypes, libc, os, refuse, resource
try:
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
except Exception as error:
    trace = error.__traceback__.tb_next  # the program's own line
    print(f"line {trace.tb_lineno}: " if trace else "", type(error).__name__, f": {error}", sep="", file=sys.stderr)
    sys.exit(1)
"""
