# Everything happens in .venv; nothing else is installed. PYTHON=/path/to/python picks an interpreter.

.PHONY: help setup check test test-all compare clean

help:
	@echo "make setup     .venv with phyla and its pinned dependencies (at once if nothing changed)"
	@echo "make test      the tests"
	@echo "make test-all  the slow ones too"
	@echo "make check     lint, format and types"
	@echo "make compare   the main job: trains every small architecture and reports which is better"
	@echo "make clean     removes .venv and caches, not runs/"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@.ci/make-venv $(PYTHON)
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip
	@echo "Installing phyla and its dependencies into .venv (the first time takes a few minutes)"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright

test: setup
	.venv/bin/python -m pytest -n 2

test-all: setup
	.venv/bin/python -m pytest -n 2 -m ''

compare: setup
	.venv/bin/phyla compare --compress int8 nf4 gptq-int4

clean:
	rm -rf .venv .cache .hypothesis .pytest_cache .ruff_cache build phyla.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
