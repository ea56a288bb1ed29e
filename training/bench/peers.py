"""Another interpreter that times other implementations of the same models, asked by lines of JSON."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from phyla.models.errors import UserError

SCRIPT = Path(__file__).with_name("torch_peer.py")


class Peers:
    """The process of `torch_peer.py`. Raises UserError with its last words if it ends before it has answered."""

    def __init__(self, python: Path, process: subprocess.Popen[bytes], errors: IO[str]):
        self._python, self._process, self._errors = python, process, errors
        self.versions = self._answer()
        """Of torch and transformers, and torch's number of threads."""

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """What `torch_peer.Peer` answers."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its last words say why
            self._process.stdin.write(json.dumps({"do": do} | options).encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2]
            raise UserError(f"--peers {self._python}: {last or f'ended with status {status}'}")
        return json.loads(line)


@contextlib.contextmanager
def start(python: Path) -> Iterator[Peers]:
    """Runs `torch_peer.py` under another interpreter, in the environment of this process, until the context ends.

    Raises UserError if it cannot start.
    """
    with tempfile.TemporaryFile("w+") as errors:
        # -I: the script's folder is not on its path, where our modules would hide others of the same names.
        command = [python, "-I", SCRIPT]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        except OSError as error:
            raise UserError(f"--peers {python}: {error.strerror}") from error
        with process:
            try:
                yield Peers(python, process, errors)
            finally:
                process.kill()
