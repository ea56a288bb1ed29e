"""Documents: where the text comes from.

Every reader is one generator of (document, position after it); opening it again at a saved position gives the rest.
Documents in memory are the same generator read to its end.
"""

import glob
import json
import lzma
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from phyla.models.errors import UserError
from phyla.training.data.config import BUILT_IN_SOURCE, DataConfig

Split = Literal["train", "validation"]
Position = Any
"""Where a reader stands, as JSON values. None is the beginning."""

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
    """Return the documents of a split, in a fixed order.

    Returns:
        A sequence; when `config.streaming` is on, an iterator that reads as it goes.

    Raises:
        UserError: a path matches nothing, a file is not UTF-8, a line is not JSON or lacks the text field (with
            file:line), a dataset cannot be loaded or lacks the column, or there are too few documents to split.
    """
    if config.streaming:
        return (document for document, _ in stream(config, split))
    return _documents(config, split)


def stream(config: DataConfig, split: Split, position: Position = None) -> Iterator[tuple[str, Position]]:
    """Yield (document, position after it) from `position` on; raises as `documents` does."""
    source = config.source if split == "train" else config.validation
    if source is None or source == BUILT_IN_SOURCE:
        start = position or 0
        held = _documents(config, split)
        return ((held[i], i + 1) for i in range(start, len(held)))
    return _read(source, f"data.{'source' if split == 'train' else 'validation'}", config.text_field, position)


def austen() -> dict[str, str]:
    """Return the six novels by title; joined in order they are the shipped text, byte for byte."""
    text = lzma.decompress(Path(__file__).with_name("austen.txt.xz").read_bytes()).decode("utf-8")
    starts = [match.start() for match in re.finditer(rf"^(?:{'|'.join(NOVELS)})$", text, re.MULTILINE)]
    ends = [*starts[1:], len(text)]
    return {title: text[start:end] for title, start, end in zip(NOVELS, starts, ends, strict=True)}


def _documents(config: DataConfig, split: Split) -> Sequence[str]:
    if split == "validation" and config.validation is not None:
        if config.validation == BUILT_IN_SOURCE:
            return [austen()[HELD_OUT_NOVEL]]
        return _read_all(config.validation, "data.validation", config.text_field)
    if config.source == BUILT_IN_SOURCE:
        return [text for title, text in austen().items() if (title == HELD_OUT_NOVEL) == (split == "validation")]
    everything = _read_all(config.source, "data.source", config.text_field)
    if config.validation is not None:
        return everything
    return _hold_out(everything, config, split)


def _hold_out(everything: Sequence[str], config: DataConfig, split: Split) -> Sequence[str]:
    """Split off the last documents; a single document is split at the start of a line."""
    if len(everything) == 0:
        raise UserError(f"data.source: {config.source!r} holds no document")
    if len(everything) == 1:
        text = everything[0]
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


def _read_all(source: str, field: str, text_field: str) -> Sequence[str]:
    if source.startswith("hf:"):
        column = _load_dataset(source, field, text_field, streaming=False)[text_field]
        return [_text(value, source, text_field) for value in column]
    return [document for document, _ in _read(source, field, text_field, None)]


def _read(source: str, field: str, text_field: str, position: Position) -> Iterator[tuple[str, Position]]:
    if source.startswith("hf:"):
        return _read_dataset(source, field, text_field, position)
    return _read_files(_paths(source, field), text_field, position)


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


def _read_files(paths: list[Path], text_field: str, position: Position) -> Iterator[tuple[str, Position]]:
    """Read text and JSON-lines files; a position is [file, byte offset, line]."""
    first_file, offset, line = position or (0, 0, 0)
    for index in range(first_file, len(paths)):
        path = paths[index]
        if path.suffix != ".jsonl":
            yield _decode(path.read_bytes(), str(path)), [index + 1, 0, 0]
            continue
        with path.open("rb") as file:  # binary: JSON lines end at \n only, not at U+2028
            file.seek(offset)
            while raw := file.readline():
                offset, line = offset + len(raw), line + 1
                if raw.strip():
                    yield _parse(raw, f"{path}:{line}", text_field), [index, offset, line]
        offset, line = 0, 0


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {error.start})") from None


def _parse(raw: bytes, place: str, text_field: str) -> str:
    try:
        record = json.loads(_decode(raw, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not a line of JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a line must be a JSON object, not {type(record).__name__}")
    if text_field not in record:
        raise UserError(
            f"{place}: no field {text_field!r} (data.text_field), it has {', '.join(map(repr, record)) or 'none'}"
        )
    return _text(record[text_field], place, text_field)


def _text(value: object, place: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: field {text_field!r} must be a string, not {type(value).__name__}")
    # a JSON escape such as "\ud800" makes a string that no UTF-8 tokenizer can encode
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: field {text_field!r} is not valid Unicode (a lone surrogate)")
    return value


def _load_dataset(source: str, field: str, text_field: str, *, streaming: bool) -> Any:
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
    if columns is not None and text_field not in columns:
        raise UserError(
            f"{field}: {source!r} has no column {text_field!r} (data.text_field), it has "
            + ", ".join(map(repr, columns))
        )
    return dataset


def _read_dataset(source: str, field: str, text_field: str, position: Position) -> Iterator[tuple[str, Position]]:
    """Stream a dataset; a position is the state of the `datasets.IterableDataset`."""
    dataset = _load_dataset(source, field, text_field, streaming=True)
    if position is not None:
        dataset.load_state_dict(position)
    for record in dataset:
        if text_field not in record:
            raise UserError(f"{field}: a record of {source!r} has no {text_field!r} (data.text_field)")
        yield _text(record[text_field], source, text_field), dataset.state_dict()
