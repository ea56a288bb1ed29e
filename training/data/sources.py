"""Documents: where the text comes from, and with `data.template` the conversations.

Every reader is one generator of (document, position after it); opening it again at a saved position gives the rest.
Documents in memory are the same generator read to its end.
"""

import glob
import json
import lzma
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from phyla.models.errors import UserError
from phyla.training.data import arithmetic
from phyla.training.data.config import BUILT_IN_SOURCE, DataConfig, problem_count
from phyla.training.data.conversations import Conversation, as_text, read_record, valid_text

Split = Literal["train", "validation"]
Position = Any
"""Where a reader stands, as JSON values. None is the beginning."""
Reader = Callable[[Mapping[str, Any], str], Any]
"""(record, place) -> the document that it is."""

NOVELS = (
    "EMMA",
    "MANSFIELD PARK",
    "NORTHANGER ABBEY",
    "Persuasion",
    "PRIDE AND PREJUDICE",
    "SENSE AND SENSIBILITY",
)
HELD_OUT_NOVEL = "Persuasion"


def documents(config: DataConfig, split: Split) -> Sequence[str] | Iterator[str]:
    """Return the documents of a split, in a fixed order; a conversation is the text that is said in it.

    Returns:
        A sequence; when `config.streaming` is on, an iterator that reads as it goes.

    Raises:
        UserError: a path matches nothing, a file is not UTF-8, a line is not JSON or lacks the text field (with
            file:line), a dataset cannot be loaded or lacks the column, or there are too few documents to split.
    """
    if config.template is not None:
        return [as_text(conversation) for conversation in conversations(config, split)]
    if config.streaming:
        return (document for document, _ in stream(config, split))
    return _documents(config, split)


def conversations(config: DataConfig, split: Split) -> Iterator[Conversation]:
    """Yield the conversations of a split, in a fixed order.

    Raises:
        UserError: as `documents` does, and where a record is no conversation.
    """
    if config.template is None:
        raise UserError("data.template must name a template (such as 'plain') for a text to be read as conversations")
    if config.streaming:
        return (conversation for conversation, _ in stream(config, split))
    return iter(_documents(config, split))


def stream(config: DataConfig, split: Split, position: Position = None) -> Iterator[tuple[Any, Position]]:
    """Yield (document, position after it) from `position` on; raises as `documents` does.

    A document is its text, or its `Conversation` where the config has a template.
    """
    source = config.source if split == "train" else config.validation
    if source is None or source == BUILT_IN_SOURCE or problem_count(source):
        start = position or 0
        held = _documents(config, split)
        return ((held[i], i + 1) for i in range(start, len(held)))
    return _read(source, f"data.{'source' if split == 'train' else 'validation'}", config, position)


def austen() -> dict[str, str]:
    """Return the six novels by title; joined in order they are the shipped text, byte for byte."""
    text = lzma.decompress(Path(__file__).with_name("austen.txt.xz").read_bytes()).decode("utf-8")
    starts = [match.start() for match in re.finditer(rf"^(?:{'|'.join(NOVELS)})$", text, re.MULTILINE)]
    ends = [*starts[1:], len(text)]
    return {title: text[start:end] for title, start, end in zip(NOVELS, starts, ends, strict=True)}


def _documents(config: DataConfig, split: Split) -> Sequence[Any]:
    if split == "validation" and config.validation is not None:
        if config.validation == BUILT_IN_SOURCE:
            return [austen()[HELD_OUT_NOVEL]]
        if count := problem_count(config.validation):
            return arithmetic.conversations(count, "validation")
        return _read_all(config.validation, "data.validation", config)
    if config.source == BUILT_IN_SOURCE:
        return [text for title, text in austen().items() if (title == HELD_OUT_NOVEL) == (split == "validation")]
    if count := problem_count(config.source):
        share = 1.0 if split == "train" else config.validation_fraction
        return arithmetic.conversations(max(1, round(count * share)), split)
    everything = _read_all(config.source, "data.source", config)
    if config.validation is not None:
        return everything
    return _hold_out(everything, config, split)


def _hold_out(everything: Sequence[Any], config: DataConfig, split: Split) -> Sequence[Any]:
    """Split off the last documents; a single document is split at the start of a line."""
    if len(everything) == 0:
        raise UserError(f"data.source: {config.source!r} holds no document")
    if len(everything) == 1:
        text = everything[0]
        if not isinstance(text, str):
            raise UserError(f"data.source: {config.source!r} is one conversation, name data.validation")
        end = math.floor(len(text) * (1.0 - config.validation_fraction))
        cut = 1 + (text.rfind("\n", 0, end) if "\n" in text[:end] else text.find("\n"))
        if cut in (0, len(text)):
            raise UserError(
                f"data.source: {config.source!r} is one document without a line to split it at, name data.validation"
            )
        return [text[:cut]] if split == "train" else [text[cut:]]
    held_out = min(max(1, round(len(everything) * config.validation_fraction)), len(everything) - 1)
    cut = len(everything) - held_out
    return everything[:cut] if split == "train" else everything[cut:]


def _read_all(source: str, field: str, config: DataConfig) -> Sequence[Any]:
    if source.startswith("hf:"):
        dataset, place = _load_dataset(source, field, config, streaming=False), f"{field}: {source!r}"
        if config.template is None:  # the other columns stay on disk
            what = f"{place}: field {config.text_field!r}"
            return [valid_text(value, what) for value in dataset[config.text_field]]
        return [read_record(record, place) for record in dataset]
    return [document for document, _ in _read(source, field, config, None)]


def _read(source: str, field: str, config: DataConfig, position: Position) -> Iterator[tuple[Any, Position]]:
    if source.startswith("hf:"):
        return _read_dataset(source, field, config, position)
    return _read_files(_paths(source, field), config, position)


def _reader(config: DataConfig) -> Reader:
    def read_text(record: Mapping[str, Any], place: str) -> str:
        if config.text_field not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise UserError(f"{place}: no field {config.text_field!r} (data.text_field), it has {found}")
        return valid_text(record[config.text_field], f"{place}: field {config.text_field!r}")

    return read_text if config.template is None else read_record


def _paths(source: str, field: str) -> list[Path]:
    # a name that holds [ or ? is a file's name first
    names = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
    paths = [Path(name) for name in names]
    if not paths:
        raise UserError(
            f"{field}: no file matches {source!r} (a source is 'austen', a text file or glob, PATH.jsonl or hf:NAME)"
        )
    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise UserError(f"{field}: {folders[0]} is a folder; write '{folders[0]}/*.txt' or 'hf:{folders[0]}'")
    return paths


def _read_files(paths: list[Path], config: DataConfig, position: Position) -> Iterator[tuple[Any, Position]]:
    """Read text and JSON-lines files; a position is [file, byte offset, line]."""
    read = _reader(config)
    first_file, offset, line = position or (0, 0, 0)
    for index in range(first_file, len(paths)):
        path = paths[index]
        if path.suffix != ".jsonl":
            if config.template is not None:
                raise UserError(f"{path}: conversations (data.template) are read from PATH.jsonl or hf:NAME_OR_FOLDER")
            yield _decode(path.read_bytes(), str(path)), [index + 1, 0, 0]
            continue
        with path.open("rb") as file:  # binary: JSON lines end at \n only, not at U+2028
            file.seek(offset)
            while raw := file.readline():
                offset, line = offset + len(raw), line + 1
                if raw.strip():
                    place = f"{path}:{line}"
                    yield read(_parse(raw, place), place), [index, offset, line]
        offset, line = 0, 0


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {error.start})") from None


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(_decode(raw, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not a line of JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a line must be a JSON object, not {type(record).__name__}")
    return record


def _load_dataset(source: str, field: str, config: DataConfig, *, streaming: bool) -> Any:
    import datasets  # slow to import
    from datasets.exceptions import DatasetsError

    rest, _, split = source.removeprefix("hf:").partition("#")
    name, _, configuration = rest.partition("@")
    try:
        dataset: Any = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=streaming)
    except (ValueError, OSError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{field}: cannot load {source!r}: {reason}") from error
    columns = dataset.column_names
    if config.template is None and columns is not None and config.text_field not in columns:
        raise UserError(
            f"{field}: {source!r} has no column {config.text_field!r} (data.text_field), it has "
            + ", ".join(map(repr, columns))
        )
    return dataset


def _read_dataset(source: str, field: str, config: DataConfig, position: Position) -> Iterator[tuple[Any, Position]]:
    """Stream a dataset; a position is the state of the `datasets.IterableDataset`."""
    dataset, read = _load_dataset(source, field, config, streaming=True), _reader(config)
    if position is not None:
        dataset.load_state_dict(position)
    for record in dataset:
        yield read(record, f"{field}: {source!r}"), dataset.state_dict()
