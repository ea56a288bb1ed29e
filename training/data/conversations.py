"""Conversations: who says what, and the layouts of the records that say so."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from phyla.models.errors import UserError


class Turn(NamedTuple):
    """What one side says; the role is system, user or assistant."""

    role: str
    content: str


Conversation = tuple[Turn, ...]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Of the roles that are written somewhere, ours."""


def _pair(prompt: str, response: str) -> Callable[[Mapping[str, Any]], list[tuple[Any, Any]]]:
    return lambda record: [("user", record[prompt]), ("assistant", record[response])]


def _alpaca(record: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    asked = record["instruction"]
    if record.get("input"):
        asked = f"{asked}\n\n{record['input']}"
    return [("user", asked), ("assistant", record["output"])]


def _turns(field: str, role: str, content: str) -> Callable[[Mapping[str, Any]], list[tuple[Any, Any]]]:
    return lambda record: [(each[role], each[content]) for each in record[field]]


_LAYOUTS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], list[tuple[Any, Any]]]] = {
    ("messages",): _turns("messages", "role", "content"),
    ("conversations",): _turns("conversations", "from", "value"),  # ShareGPT
    ("instruction", "output"): _alpaca,  # and perhaps input
    ("prompt", "response"): _pair("prompt", "response"),
    ("prompt", "completion"): _pair("prompt", "completion"),
    ("question", "answer"): _pair("question", "answer"),
}
"""The keys of a record -> its roles and contents. The first layout counts whose keys are all there."""


def read_record(record: Mapping[str, Any], place: str) -> Conversation:
    """Return the conversation of a JSON object, by the first layout whose keys it has.

    Raises:
        UserError: no layout fits, or a turn has an unknown role or is no text; with the place.
    """
    keys = next((keys for keys in _LAYOUTS if all(key in record for key in keys)), None)
    if keys is None:
        known = "; ".join(", ".join(each) for each in _LAYOUTS)
        found = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{place}: a record with the keys {found} is no conversation; layouts: {known}")
    try:
        turns = _LAYOUTS[keys](record)
    except (KeyError, TypeError) as error:
        raise UserError(f"{place}: {keys[0]!r} is not a list of turns with their role and content") from error
    unknown = [role for role, _ in turns if role not in _ROLES]
    if unknown:
        raise UserError(f"{place}: no role {unknown[0]!r} (all: {', '.join(_ROLES)})")
    return tuple(Turn(_ROLES[role], valid_text(content, f"{place}: what the {role} says")) for role, content in turns)


def valid_text(value: object, what: str) -> str:
    """Return the value. Raises UserError if it is no string, or none that has an encoding."""
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, not {type(value).__name__}")
    # a JSON escape such as "\ud800" makes a string that no UTF-8 tokenizer can encode
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{what} is not valid Unicode (a lone surrogate)")
    return value


def as_text(conversation: Conversation) -> str:
    """Return what is said, without who says it."""
    return "\n".join(turn.content for turn in conversation)


def response_bytes(conversation: Conversation) -> int:
    """Return the UTF-8 bytes of what the assistant says."""
    return sum(len(turn.content.encode("utf-8")) for turn in conversation if turn.role == "assistant")


def split_last(conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, str]]:
    """Yield (the turns before, the response) of each conversation that the assistant ends."""
    for conversation in conversations:
        if conversation and conversation[-1].role == "assistant":
            yield conversation[:-1], conversation[-1].content
