"""The one kind of error that is the user's to fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: one line that says what, where and the nearest valid choice. The command line exits with 2."""


def choose(what: str, name: str, choices: Iterable[str]) -> str:
    """The name if it is one of the choices. Raises UserError with the nearest one if not."""
    choices = list(choices)
    if name in choices:
        return name
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
    raise UserError(f"no {what} '{name}'; nearest: {nearest} (all: {', '.join(choices)})")
