"""`make setup`: which Python, and which versions."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path):
    """A folder with the script, a home, and a PATH on which there is nothing but the tools it uses."""
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "env"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")

    def make_venv(*arguments: str) -> subprocess.CompletedProcess:
        environment = {"HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}
        command = [ROOT / ".ci" / "make-venv", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return make_venv


def interpreter(path: Path, then: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{then}\n")
    path.chmod(0o755)


def test_no_python_is_one_line(machine, tmp_path):
    interpreter(tmp_path / "bin" / "python3", "exit 1")  # too old, or a shim without a version
    done = machine()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("make setup: found no Python >= 3.12 .*\n", done.stderr)
    assert not (tmp_path / ".venv").exists()


def test_finds_pyenv_behind_an_old_python3_and_keeps_what_it_made(machine, tmp_path):
    real = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("python3", "python3.13", "python"):
        interpreter(tmp_path / "bin" / name, "exit 127")
    pyenv = tmp_path / ".pyenv" / "versions"
    interpreter(pyenv / "3.11.7" / "bin" / "python", "exit 1")
    interpreter(pyenv / "3.12.4" / "bin" / "python", f'exec "{real}" "$@"')
    done = machine()
    assert done.returncode == 0, done.stderr
    assert f"{pyenv}/3.12.4/bin/python" in done.stdout
    subprocess.run([tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)
    again = machine()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_constraints_are_names_and_versions_and_cover_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)] == []

    def name(requirement: str) -> str:
        return re.split(r"[\[<>=~; ]", requirement)[0].lower().replace("_", "-")

    pinned = {name(line): line.partition("==")[2] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {name(each) for each in wanted} - set(pinned) == set()
    assert version("tyro") == pinned["tyro"]  # phyla.arguments uses a hook that is private to it
