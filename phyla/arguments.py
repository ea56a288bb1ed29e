"""Typed command lines: a dataclass becomes options, and whatever does not fit becomes one line that says so.

tyro does the parsing. Its boxed errors are replaced by UserError through `tyro._errors.on_parse_error`, a hook
that is private to the tyro version that constraints.txt pins; tests/phyla/test_arguments.py notices a change.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import tyro
from tyro import _errors as events

from phyla.models.errors import UserError, choose

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition


def parse[T](options: type[T], arguments: Sequence[str], *, prog: str) -> T:
    """The dataclass `options` with the values that the arguments give; the rest keep their defaults.

    Nested dataclasses and tuples of them are reached by dots: `--model.pattern.0.mixer.heads 8`. `--help` prints
    the class's docstring and every option, and exits with 0. Raises UserError with one line that names the option.
    """
    description = inspect.getdoc(options)

    def reject(event: events.ParseErrorEvent) -> None:
        _reject(event, arguments, list(option_names(options)))

    with events.on_parse_error(reject):
        return tyro.cli(
            options,
            args=arguments,
            prog=prog,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )


def option_names(options: Any, prefix: str = "--") -> Iterator[str]:
    """Every option of a dataclass (or of an instance), as tyro names it."""
    hints = get_type_hints(options if isinstance(options, type) else type(options), include_extras=True)
    for field in fields(options):
        value = field.default if isinstance(options, type) else getattr(options, field.name)
        kinds, name = get_args(hints[field.name]), field.name.replace("_", "-")
        if is_dataclass(value):
            yield from option_names(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and any(map(is_dataclass, value)):
            for index, each in enumerate(value):
                yield from option_names(each, f"{prefix}{name}.{index}.")
        elif not any(kind is tyro.conf.Positional or is_dataclass(kind) for kind in kinds):
            yield from (f"{prefix}{name}", *([f"{prefix}no-{name}"] if isinstance(value, bool) else []))


def _reject(event: events.ParseErrorEvent, arguments: Sequence[str], options: list[str]) -> None:
    """Raises UserError for the events that are known; tyro prints its own message for any other."""
    match event:
        case events.UnrecognizedArgs(tokens=[token, *_]):
            _unrecognized(token, arguments, options)
        case events.InvalidChoice(argument=argument, value=value, choices=choices):
            choose(_name(argument), value, choices)
        case events.BadValue(argument=argument):
            name = _name(argument)
            raise UserError(f"{name} needs a value (one that starts with a dash is given as {name}=VALUE)")
        case events.MissingArgs(missing_arguments=missing):
            raise UserError(f"{', '.join(_name(each.arg) for each in missing)} must be given")
        case events.InstantiationFailure(argument=None, message=message):
            raise UserError(message)  # from a __post_init__, which names the field itself
        case events.InstantiationFailure(argument=argument) if argument:
            name, kind = _name(argument), str(argument.lowered.metavar)
            for metavar, words in (("INT", "an integer"), ("FLOAT", "a number"), ("{None}", "None")):
                kind = kind.replace(metavar, words)
            raise UserError(f"{name} must be {kind.replace('|', ' or ')}, not '{_value(name, arguments)}'")


def _unrecognized(token: str, arguments: Sequence[str], options: list[str]) -> NoReturn:
    option, _, _ = token.partition("=")
    if re.match(r"--?[a-zA-Z]", option):
        raise UserError(f"no option {option}; nearest: {max(options, key=lambda o: _likeness(option, o))}")
    before = arguments[: arguments.index(token)] if token in arguments else []
    last = next((each for each in reversed(before) if each.startswith("--")), None)
    where = f" after {last}" if last else ""
    raise UserError(f"unexpected '{token}'{where}")


def _likeness(given: str, option: str) -> tuple[float, float]:
    """By the closer of the whole name and its last part, so that --heads finds --model.pattern.0.mixer.heads."""
    whole = difflib.SequenceMatcher(None, given, option).ratio()
    last = difflib.SequenceMatcher(None, given.split(".")[-1].lstrip("-"), option.split(".")[-1].lstrip("-"))
    return max(whole, last.ratio()), whole


def _name(argument: "ArgumentDefinition") -> str:
    lowered = argument.lowered
    return str(lowered.metavar) if argument.is_positional() else lowered.name_or_flags[0]


def _value(name: str, arguments: Sequence[str]) -> str:
    """What the arguments give an option, the last time that they do."""
    for token, following in reversed(list(pairwise([*arguments, ""]))):
        option, equals, value = token.partition("=")
        if option.replace("_", "-") == name:
            return value if equals else following
    raise LookupError(f"{name} is not among the arguments")
