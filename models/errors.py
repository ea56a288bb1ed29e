"""The errors that the user is told in one line; any other keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: one line that says what, where and the nearest valid choice. The command line exits with 2."""


class Diverged(RuntimeError):
    """A training run that gave too many non-finite updates in a row: one line. The command line exits with 1."""


def choose(what: str, name: str, choices: Iterable[str]) -> str:
    """The name if it is one of the choices. Raises UserError with the nearest one if not."""
    choices = list(choices)
    if name in choices:
        return name
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
    raise UserError(f"no {what} '{name}'; nearest: {nearest} (all: {', '.join(choices)})")
