"""The errors that the user is told in one line; any other keeps its traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: one line that says what, where and the nearest valid choice. The command line exits with 2."""


class Diverged(RuntimeError):
    """A training run that gave too many non-finite updates in a row: one line. The command line exits with 1."""


def check_divides(name: str, value: int, what: str, whole: int) -> None:
    """Raises UserError with the nearest divisor of `whole` if `value` is none."""
    if whole < 1:
        raise UserError(f"{what} must be at least 1, not {whole}")
    if value < 1 or whole % value:
        nearest = min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - value))
        raise UserError(f"{name} {value} does not divide {what} {whole}; nearest: {nearest}")


def choose(what: str, name: str, choices: Iterable[str]) -> str:
    """The name if it is one of the choices. Raises UserError with the nearest one if not."""
    choices = list(choices)
    if name in choices:
        return name
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]
    raise UserError(f"no {what} '{name}'; nearest: {nearest} (all: {', '.join(choices)})")
