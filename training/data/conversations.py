"""Conversations: the layouts of their records, and the templates that make tokens of them.

A template writes what is around each turn. Its markers, such as <|im_start|>, are special tokens of the tokenizer; the
same characters in what someone says are plain text. Of the tokens of a conversation those of the assistant's words
count, and the token that ends its turn.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from phyla.models.errors import UserError

if TYPE_CHECKING:
    from phyla.training.data.tokenizers import Tokenizer


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


class Mark(NamedTuple):
    """A special token by its name; bos and eos are the tokenizer's own, whatever their names."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """What is written around turns; in texts {role} and {Role} stand for the turn's."""

    begin: tuple[str | Mark, ...]
    """In front of the conversation."""
    before: tuple[str | Mark, ...]
    """In front of each turn."""
    end: Mark
    """Ends the assistant's turn, and counts."""
    after: tuple[str | Mark, ...]
    """Behind that, and does not count."""
    others: tuple[str | Mark, ...]
    """Behind the turn of anyone else."""


TEMPLATES = {
    # OpenAI's; Qwen, SmolLM2 and many others
    "chatml": Template(
        begin=(),
        before=(Mark("<|im_start|>"), "{role}\n"),
        end=Mark("<|im_end|>"),
        after=("\n",),
        others=(Mark("<|im_end|>"), "\n"),
    ),
    # Llama 3's
    "llama3": Template(
        begin=(Mark("bos"),),
        before=(Mark("<|start_header_id|>"), "{role}", Mark("<|end_header_id|>"), "\n\n"),
        end=Mark("<|eot_id|>"),
        after=(),
        others=(Mark("<|eot_id|>"),),
    ),
    # for every tokenizer
    "plain": Template(begin=(Mark("bos"),), before=("{Role}:\n",), end=Mark("eos"), after=(), others=("\n\n",)),
}


class Encoded(NamedTuple):
    """A conversation as tokens."""

    tokens: np.ndarray
    """int32 [L]."""
    weights: np.ndarray
    """float32 [L]: 1 for a token that counts as a target."""


class ChatFormat:
    """A template with a tokenizer.

    Args:
        name: of the template; "auto" is the first whose markers are special tokens of the tokenizer.
        tokenizer: makes the tokens.

    Raises:
        UserError: the tokenizer lacks a marker of the template.
    """

    def __init__(self, name: str, tokenizer: "Tokenizer"):
        if name == "auto":
            name = next(each for each, template in TEMPLATES.items() if not _lacking(template, tokenizer))
        if lacking := _lacking(TEMPLATES[name], tokenizer):
            raise UserError(
                f"data.template {name!r} needs the special tokens {', '.join(lacking)}, which data.tokenizer has not; "
                "nearest: plain"
            )
        self.name = name
        self._template, self._tokenizer = TEMPLATES[name], tokenizer
        self.end_id = self._id(self._template.end)

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the tokens of a conversation and which of them count."""
        template, parts = self._template, [(part, 0.0) for part in self._template.begin]
        for turn in conversation:
            counts = float(turn.role == "assistant")
            parts += [(part, 0.0) for part in self._before(turn.role)]
            parts.append((turn.content, counts))
            behind = (template.end, *template.after) if counts else template.others
            parts += [(part, counts * (part is template.end)) for part in behind]
        return self._encode(parts)

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """Return the tokens, int32 [L], that the assistant's next words follow."""
        tokens = self.encode(conversation).tokens
        opening = self._encode([(part, 0.0) for part in self._before("assistant")]).tokens
        return np.concatenate([tokens, opening])

    def _before(self, role: str) -> tuple[str | Mark, ...]:
        return tuple(
            part if isinstance(part, Mark) else part.format(role=role, Role=role.title())
            for part in self._template.before
        )

    def _encode(self, parts: Iterable[tuple[str | Mark, float]]) -> Encoded:
        """Texts that follow each other and count alike are one text to the tokenizer."""
        tokens, weights, text, text_weight = [], [], "", 0.0

        def add(ids: np.ndarray | list[int], weight: float) -> None:
            tokens.extend(ids)
            weights.extend(itertools.repeat(weight, len(ids)))

        for part, weight in parts:
            if text and (isinstance(part, Mark) or weight != text_weight):
                add(self._tokenizer.encode(text), text_weight)
                text = ""
            if isinstance(part, Mark):
                add([self._id(part)], weight)
            else:
                text, text_weight = text + part, weight
        if text:
            add(self._tokenizer.encode(text), text_weight)
        return Encoded(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))

    def _id(self, mark: Mark) -> int:
        own = {"bos": self._tokenizer.bos_id, "eos": self._tokenizer.eos_id}
        found = own.get(mark.name, self._tokenizer.special_id(mark.name))
        assert found is not None
        return found


def _lacking(template: Template, tokenizer: "Tokenizer") -> list[str]:
    parts: Sequence[str | Mark] = (*template.begin, *template.before, template.end, *template.after, *template.others)
    names = dict.fromkeys(part.name for part in parts if isinstance(part, Mark))
    return [name for name in names if name not in ("bos", "eos") and tokenizer.special_id(name) is None]


def fit(encoded: Encoded, length: int) -> Encoded | None:
    """Return the last `length` tokens; None where a token that counts would be lost (the first one is no target)."""
    surplus = max(0, len(encoded.tokens) - length)
    if not encoded.weights.any() or encoded.weights[: surplus + 1].any():
        return None
    return Encoded(encoded.tokens[surplus:], encoded.weights[surplus:])


def response_bytes(conversation: Conversation) -> int:
    """Return the UTF-8 bytes of what the assistant says."""
    return sum(len(turn.content.encode("utf-8")) for turn in conversation if turn.role == "assistant")


def split_last(conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, str]]:
    """Yield (the turns before, the response) of each conversation that the assistant ends."""
    for conversation in conversations:
        if conversation and conversation[-1].role == "assistant":
            yield conversation[:-1], conversation[-1].content
