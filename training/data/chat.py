"""Tokens of conversations: the tokenizer's own template, or one of those that are built in.

A template writes what is around each turn. Its markers, such as <|im_start|>, are special tokens of the tokenizer; the
same characters in what someone says are plain text. Of the tokens of a conversation those of the assistant's words
count, and the token that ends its turn.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from phyla.models.errors import UserError
from phyla.training.data.conversations import Conversation, Turn, as_text
from phyla.training.data.templates import ChatTemplate
from phyla.training.data.tokenizers import HuggingFaceTokenizer, Tokenizer


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


class ChatFormat(Protocol):
    """How conversations become tokens: see `chat_format`."""

    name: str
    end_id: int
    """Ends the assistant's turn."""

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the tokens of a conversation and which of them count."""
        ...

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """Return the tokens, int32 [L], that the assistant's next words follow."""
        ...


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """Return the format of a template of `TEMPLATES`; "auto": the tokenizer's own, else the first whose markers it has.

    Raises:
        UserError: the tokenizer lacks a marker of the template, or its own cannot be used.
    """
    if name == "auto" and isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.chat_template is not None:
        return _OwnFormat(tokenizer, tokenizer.chat_template)
    if name == "auto":
        name = next(each for each, template in TEMPLATES.items() if not _lacking(template, tokenizer))
    if lacking := _lacking(TEMPLATES[name], tokenizer):
        raise UserError(
            f"data.template {name!r} needs the special tokens {', '.join(lacking)}, which data.tokenizer has not; "
            "nearest: plain"
        )
    return _BuiltInFormat(name, tokenizer)


class _OwnFormat:
    """What the tokenizer's own template writes, as the tokenizer reads it."""

    name = "auto"

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template
        self._names = sorted(tokenizer.special, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._special_ids = np.asarray(list(tokenizer.special.values()), np.int32)
        tokens, weights = self.encode((Turn("user", "a"), Turn("assistant", "b")))
        last = int(tokens[np.flatnonzero(weights)[-1]])
        self.end_id = last if last in self._special_ids else tokenizer.eos_id

    def encode(self, conversation: Conversation) -> Encoded:
        """See `ChatFormat.encode`."""
        messages, mark = self._messages(conversation)
        text, spans = self._template.spans(messages)
        tokens, places = self._read(text, mark)
        weights = np.zeros(len(tokens), np.float32)
        ends = np.maximum(places[:, 1], places[:, 0] + 1)  # a token of no character is where it begins
        for begin, end in spans:
            (inside,) = np.nonzero((places[:, 0] < end) & (ends > begin))
            # what is written behind the mark that ends a turn, a new line perhaps, is never to be said
            marks = np.flatnonzero(np.isin(tokens[inside], self._special_ids))
            weights[inside[: marks[-1] + 1] if len(marks) else inside] = 1
        return Encoded(tokens, weights)

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """See `ChatFormat.prompt`."""
        messages, mark = self._messages(conversation)
        return self._read(self._template.render(messages, opened=True), mark)[0]

    def _messages(self, conversation: Conversation) -> tuple[list[dict[str, str]], str]:
        """The turns, and a mark: the name of a special token in what is said is its number between two of them."""
        said = as_text(conversation)
        mark = next(each for each in map(chr, range(0xE000, 0x110000)) if each not in said)

        def hidden(text: str) -> str:
            return self._find.sub(lambda found: f"{mark}{self._names.index(found[0])}{mark}", text)

        return [{"role": turn.role, "content": hidden(turn.content)} for turn in conversation], mark

    def _read(self, text: str, mark: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [L], and where in the text each begins and ends, integers [L, 2]."""
        found, at = [], 0
        for i, part in enumerate(re.split(f"({mark}[0-9]+{mark})", text)):
            if i % 2:
                tokens = self._tokenizer.encode(self._names[int(part[1:-1])])
                places = np.full((len(tokens), 2), [0, len(part)])
            else:
                tokens, places = self._tokenizer.encode_written(part)
            found.append((tokens, places + at))
            at += len(part)
        tokens, places = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(places)


class _BuiltInFormat:
    """A template of `TEMPLATES` with a tokenizer that has its markers."""

    def __init__(self, name: str, tokenizer: Tokenizer):
        self.name = name
        self._template, self._tokenizer = TEMPLATES[name], tokenizer
        self.end_id = self._id(self._template.end)

    def encode(self, conversation: Conversation) -> Encoded:
        """See `ChatFormat.encode`."""
        template, parts = self._template, [(part, 0.0) for part in self._template.begin]
        for turn in conversation:
            counts = float(turn.role == "assistant")
            parts += [(part, 0.0) for part in self._before(turn.role)]
            parts.append((turn.content, counts))
            behind = (template.end, *template.after) if counts else template.others
            parts += [(part, counts * (part is template.end)) for part in behind]
        return self._encode(parts)

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """See `ChatFormat.prompt`."""
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


def _lacking(template: Template, tokenizer: Tokenizer) -> list[str]:
    parts: Sequence[str | Mark] = (*template.begin, *template.before, template.end, *template.after, *template.others)
    names = dict.fromkeys(part.name for part in parts if isinstance(part, Mark))
    return [name for name in names if name not in ("bos", "eos") and tokenizer.special_id(name) is None]


def fit(encoded: Encoded, length: int) -> Encoded | None:
    """Return the last `length` tokens; None where a token that counts would be lost (the first one is no target)."""
    surplus = max(0, len(encoded.tokens) - length)
    if not encoded.weights.any() or encoded.weights[: surplus + 1].any():
        return None
    return Encoded(encoded.tokens[surplus:], encoded.weights[surplus:])
