"""The house stands: imports only go down, and every package has one name."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("phyla", "configs", "training", "compression", "models", "kernels")  # top to bottom
FOLDERS = FLOORS[1:]


def sources(folder: str) -> list[Path]:
    """The Python files of a folder, not those behind the links in phyla/."""
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file of `package` imports, anywhere in it.

    `from a import b` is a.b; a string such as "phyla.models" counts, since registries import by name.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")
                above = parents[: len(parents) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{name.name}") for name in names)
            case ast.Constant(value=str(text)) if re.fullmatch(r"phyla(\.\w+)+", text):
                yield node.lineno, text


def wrong(source: str, floor: str, package: str) -> list[str]:
    """Imports of one file that go up, or that use a bare folder name."""
    found = []
    for number, name in imported(source, package):
        first, *rest = name.split(".")
        if first in FOLDERS:
            found.append(f"line {number}: '{name}' is a bare folder name; it is phyla.{name}")
        if first == "phyla":
            target = rest[0] if rest and rest[0] in FOLDERS else "phyla"  # the front door is all else in phyla/
            if FLOORS.index(target) < FLOORS.index(floor):
                found.append(f"line {number}: '{name}' lies above {floor}")
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor):
    found = []
    for path in sources(floor):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        package = package if floor == "phyla" else f"phyla.{package}"
        found += [f"{path.relative_to(ROOT)}, {each}" for each in wrong(path.read_text(), floor, package)]
    assert found == []


def test_tests_use_no_bare_folder_name():
    found = []
    for path in sources("tests"):
        found += [f"{path.relative_to(ROOT)}, {each}" for each in wrong(path.read_text(), "phyla", "tests")]
    assert found == []


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("import jax", False),
        ("from phyla.kernels import scan", False),
        ("from phyla import kernels", False),
        ("from phyla.training.loop import train", True),
        ("from phyla import training", True),
        ("from phyla import __version__", True),
        ("import phyla", True),
        ("def f():\n    import phyla.cli", True),
        ("NAMES = {'loop': 'phyla.training.loop'}", True),
        ("from ..training import loop", True),
        ("from . import layers", False),
        ("from kernels.scan import scan", True),
        ("import compression", True),
    ],
)
def test_the_check_itself(source, bad):
    assert bool(wrong(source, "models", "phyla.models")) == bad


def test_packages_are_the_folders_with_an_init():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = ["phyla"]
    for folder in FOLDERS:
        for path in sources(folder):
            if path.name == "__init__.py":
                found.append(".".join(("phyla", *path.relative_to(ROOT).parent.parts)))
            else:
                assert (path.parent / "__init__.py").exists(), f"{path.parent} holds modules and no __init__.py"
    assert sorted(listed) == sorted(found)


def test_phyla_links_to_the_folders_beside_it():
    links = {path.name: os.readlink(path) for path in (ROOT / "phyla").iterdir() if path.is_symlink()}
    assert links == {folder: f"../{folder}" for folder in FOLDERS}


def test_importing_phyla_is_light():
    code = "import json, sys, time; start = time.perf_counter(); import phyla; print(json.dumps(["
    code += "time.perf_counter() - start, 'jax' in sys.modules, 'numpy' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *heavy = json.loads(done.stdout)
    assert seconds < 0.5
    assert heavy == [False, False]
