"""What to train and validate on, said in plain values (nothing heavy is imported here: `--help` reads it)."""

from dataclasses import dataclass
from typing import Literal

from phyla.models.errors import UserError

BUILT_IN_SOURCE = "austen"
_PROBLEMS = "arithmetic:"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, its split, its tokenizer and the length of a training row.

    A source is "austen" (the six novels that ship with phyla), a text file or a glob of them ("books/*.txt", one
    document per file), JSON lines ("*.jsonl", one document per line) or "hf:NAME_OR_FOLDER[@CONFIG][#SPLIT]", which
    goes to `datasets.load_dataset` (SPLIT is "train" unless said).

    With a template the documents are conversations, of which only the assistant's words are learned: JSON lines or
    a dataset with `messages` (role, content), `conversations` (from, value; ShareGPT), instruction, input and output
    (Alpaca), prompt and response, or question and answer; or "arithmetic:N", N word problems that phyla makes, each
    answered at once, step by step, and by a program.
    """

    source: str = BUILT_IN_SOURCE
    """Training text: austen, a text file or glob, PATH.jsonl, hf:NAME_OR_FOLDER[@CONFIG][#SPLIT], or arithmetic:N."""

    validation: str | None = None
    """Validation text, in the notation of source. None: austen holds out Persuasion, arithmetic a share of its
    possible problems, others their last documents."""

    validation_fraction: float = 0.05
    """Share of the documents (of the text, where there is one document) held out when validation is None."""

    text_field: str = "text"
    """The field of a JSON line, or the column of a dataset, that holds the text."""

    template: Literal["auto", "chatml", "llama3", "plain"] | None = None
    """The records are conversations, written in this way; auto: by the tokenizer's own template, or by the first of
    these whose markers it has. None: they are texts."""

    streaming: bool = False
    """Read the training documents as they are needed, for text that does not fit in memory."""

    shuffle_buffer: int = 1024
    """Rows that are shuffled together when streaming (without streaming the entire set is shuffled)."""

    tokenizer: str = "bytes"
    """bytes, bpe:SIZE (trained on the training text), or the path of a Hugging Face tokenizer.json."""

    sequence_length: int = 512
    """Predicted tokens per row, T."""

    def __post_init__(self) -> None:
        """Refuse impossible values; raises UserError naming the field."""
        if self.sequence_length < 1:
            raise UserError(f"data.sequence_length must be at least 1, not {self.sequence_length}")
        if self.shuffle_buffer < 1:
            raise UserError(f"data.shuffle_buffer must be at least 1, not {self.shuffle_buffer}")
        if not 0.0 < self.validation_fraction < 1.0:
            raise UserError(
                f"data.validation_fraction must lie between 0 and 1 (exclusive), not {self.validation_fraction}"
            )
        if not self.text_field:
            raise UserError("data.text_field must name a field, such as 'text', not ''")
        _check_source("data.source", self.source)
        if self.validation is not None:
            _check_source("data.validation", self.validation)
            if self.validation == self.source:
                raise UserError(f"data.validation must differ from data.source, both are {self.source!r}")
        elif self.streaming and self.source != BUILT_IN_SOURCE and not problem_count(self.source):
            raise UserError(
                "data.validation must name a source when data.streaming is on: the last documents of a stream are "
                "not known in advance"
            )
        _check_tokenizer(self.tokenizer)
        for field, source in (("data.source", self.source), ("data.validation", self.validation)):
            if source == BUILT_IN_SOURCE and self.template is not None:
                raise UserError(f"{field} 'austen' has no conversations: leave data.template out")
            if source and source.startswith(_PROBLEMS) and self.template is None:
                raise UserError(f"{field} {source!r} is conversations: name a template, as in data.template plain")


def problem_count(source: str) -> int:
    """Return N of "arithmetic:N", and 0 for any other source."""
    return int(source.removeprefix(_PROBLEMS)) if source.startswith(_PROBLEMS) else 0


def _check_source(field: str, source: str) -> None:
    if not source.removeprefix("hf:"):
        raise UserError(
            f"{field} must be 'austen', a text file or glob, PATH.jsonl or hf:NAME_OR_FOLDER, not {source!r}"
        )
    count = source.removeprefix(_PROBLEMS)
    if count != source and not (count.isdecimal() and int(count) >= 1):
        raise UserError(f"{field} must be arithmetic:N with N at least 1, as in arithmetic:10000, not {source!r}")


def _check_tokenizer(spec: str) -> None:
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        # 256 bytes and the separator must have a token each
        if not (size.isdecimal() and int(size) >= 257):
            raise UserError(
                f"data.tokenizer must be 'bpe:SIZE' with a SIZE of at least 257, as in 'bpe:4096', not {spec!r}"
            )
    elif spec != "bytes" and not spec.endswith(".json"):
        raise UserError(f"data.tokenizer must be 'bytes', 'bpe:SIZE' or the path of a tokenizer.json, not {spec!r}")
