"""Documents to batches: encoding, packing into rows, order, position.

A document is BOS, its text and EOS; one without text is left out. A row is `sequence_length + 1` ids and their segment
ids: 1, 2, ... per document in the row, 0 for padding. The inputs are row[:-1] and the targets row[1:]; a target counts
where its segment is that of its input and is not 0. A document that goes on in the next row repeats its last id there,
so every id of every document but its BOS is a target that counts exactly once. The EOS counts as a target and spells 0
bytes.

With `data.template` a document is a conversation and a row has a third array: 1 where the token, as a target, counts.
A conversation is never divided: the next one that does not fit begins the next row. One that is longer than a row loses
its beginning, and is left out where words of the assistant would be lost or there are none.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import WindowShuffleIterDataset

from phyla.models.errors import UserError
from phyla.training.data.chat import chat_format, fit
from phyla.training.data.config import DataConfig
from phyla.training.data.conversations import Conversation, response_bytes
from phyla.training.data.sources import Position, Split, conversations, documents, stream
from phyla.training.data.tokenizers import Tokenizer, as_document, encode_document

Batch = dict[str, np.ndarray]
"""{"tokens": int32 [B, T+1], "segment_ids": int32 [B, T+1]}, of conversations also "weights": float32 [B, T+1]"""
Beside = Callable[["Packed"], Callable[[np.ndarray], Batch]]
"""From the rows of a split to a function from some rows' numbers [b] to what a batch of them has besides, [b, ...]."""
Document = dict[str, np.ndarray]
"""{"tokens": int32 [L]}, of conversations also "weights": float32 [L]"""

_EPOCHS = 2**31

_ENCODED_TOGETHER = 256
"""Documents handed to the tokenizer at once."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A split in rows.

    Attributes:
        tokens: int32 [R, T+1].
        segment_ids: int32 [R, T+1], 1, 2, ... per document in the row, 0 for padding.
        num_tokens: targets that count, in all rows; the EOS of every document is one.
        num_bytes: UTF-8 bytes of the text that those targets spell, so that
            bits per byte = total nats / ln 2 / num_bytes.
        weights: float32 [R, T+1], of conversations: 1 where the token, as a target, counts.
        note: of conversations that did not fit into a row, what became of them; else empty.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    num_tokens: int
    num_bytes: int
    weights: np.ndarray | None = None
    note: str = ""

    @property
    def rows(self) -> Batch:
        """All rows, as a batch."""
        rows = {"tokens": self.tokens, "segment_ids": self.segment_ids}
        return rows if self.weights is None else {**rows, "weights": self.weights}

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per counted target."""
        return self.num_bytes / self.num_tokens

    def batches(self, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yield the rows in order, [batch_size // process_count, T+1] each, the last batch filled up with padding.

        Raises:
            UserError: process_count does not divide batch_size.
        """
        mine = _share(batch_size, process_index, process_count)
        for start in range(0, len(self.tokens), batch_size):
            rows = slice(start + mine.start, start + mine.stop)
            yield {name: _pad_rows(value[rows], mine.stop - mine.start) for name, value in self.rows.items()}


def prepare(config: DataConfig, tokenizer: Tokenizer, split: Split, max_tokens: int | None = None) -> Packed:
    """Encode and pack a split into rows in memory, in the order of its documents.

    Args:
        config: what to read and how long the rows are.
        tokenizer: see `make_tokenizer`.
        split: "train" or "validation".
        max_tokens: stop after this many counted targets (no more documents are read than that takes). The bytes
            that they spell are exact for bytes and byte-level vocabularies. Conversations stay whole.

    Raises:
        UserError: the split does not fill one row, no conversation fits into one, or its documents cannot be read.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    if config.template is not None:
        return _prepare_conversations(config, tokenizer, split, max_tokens)
    encoded, num_tokens, num_bytes = [], 0, 0
    for ids, length in _encode(documents(config, split), tokenizer, max_tokens):
        encoded.append({"tokens": ids})
        num_tokens += len(ids) - 1
        num_bytes += length
    row_length = config.sequence_length + 1
    num_ids = num_tokens + len(encoded)
    if num_ids < row_length and num_tokens != max_tokens:
        raise UserError(
            f"data.sequence_length + 1 = {row_length} tokens make a row, the {split} text has only {num_ids}"
        )
    return Packed(**_stack(RowPacker(iter(encoded), row_length)), num_tokens=num_tokens, num_bytes=num_bytes)


def _prepare_conversations(config: DataConfig, tokenizer: Tokenizer, split: Split, max_tokens: int | None) -> Packed:
    chat, length = chat_format(config.template or "plain", tokenizer), config.sequence_length + 1
    fitting, num_tokens, num_bytes, read, cut = [], 0, 0, 0, 0
    for conversation in conversations(config, split):
        encoded = chat.encode(conversation)
        read += 1
        if (fitted := fit(encoded, length)) is None:
            continue
        cut += len(fitted.tokens) < len(encoded.tokens)
        fitting.append(fitted._asdict())
        num_tokens += int(fitted.weights.sum())
        num_bytes += response_bytes(conversation)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    if not fitting:
        raise UserError(
            f"none of the {read} {split} conversations has a response that fits into a row of data.sequence_length + 1 "
            f"= {length} tokens"
        )
    note = (
        f"of {read:,} {split} conversations {cut:,} lost their beginning and {read - len(fitting):,} were left out: "
        f"too long for a row of data.sequence_length + 1 = {length} tokens, or without a response"
    )
    return Packed(
        **_stack(RowPacker(iter(fitting), length, whole=True)),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        note=note if cut or len(fitting) < read else "",
    )


def _stack(rows: Iterable[Batch]) -> dict[str, Any]:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def train_iterator(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    note: Callable[[str], None] = lambda text: None,
    beside: Beside | None = None,
) -> grain.DatasetIterator[Batch]:
    """Return the endless iterator over training batches of one process, int32 [b, T+1] with b = batch_size / processes.

    The global batch of a step is a function of the config, the tokenizer, `batch_size` and `seed` alone; its rows
    [p * b, (p + 1) * b) are those of process p. Every epoch has an order of its own. In memory the whole split is
    shuffled; streaming shuffles windows of `config.shuffle_buffer` rows, and every process reads the entire stream.

    `get_state()` is the position as JSON values, the same in every process and for any number of processes;
    `set_state` goes back to it exactly.

    Args:
        config: what to read.
        tokenizer: see `make_tokenizer`.
        batch_size: rows of the global batch.
        seed: of the order, in [0, 2**32).
        process_index: this process, in [0, process_count).
        process_count: processes that share the global batch.
        note: told what became of conversations that do not fit, unless they are streamed.
        beside: what else is known of the rows, which must not be streamed then.

    Raises:
        UserError: process_count does not divide batch_size, the split does not fill one row, or its documents cannot
            be read.
    """
    mine = _share(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must lie in [0, 2**32), not {seed}")
    if config.streaming:
        assert beside is None
        # text that does not fill a row is refused here; the stream would go round and round
        prepare(config, tokenizer, "train", max_tokens=config.sequence_length)
        rows = WindowShuffleIterDataset(
            _RowStream(config, tokenizer),
            window_size=config.shuffle_buffer,
            # grain adds the window's number: neighbouring seeds must be far apart, and 32 bits must not overflow
            seed=int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1,
        )
        batches = rows.batch(batch_size).map(lambda batch: {key: value[mine] for key, value in batch.items()})
        # no prefetching thread: while the device computes, this process has nothing else to do
        return iter(batches)
    packed = prepare(config, tokenizer, "train")
    if packed.note:
        note(packed.note)
    more = beside(packed) if beside is not None else lambda rows_b: {}
    # as good as endless; the length of grain's own endless repeat overflows in batches of one row
    order = grain.MapDataset.range(len(packed.tokens)).seed(seed).shuffle().repeat(_EPOCHS).batch(batch_size)

    def gather(rows_B: np.ndarray) -> Batch:
        rows_b = rows_B[mine]
        return {name: value[rows_b] for name, value in packed.rows.items()} | more(rows_b)

    return iter(order.map(gather).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


class RowPacker(Iterator[Batch]):
    """Rows, one at a time, from encoded documents; what is left of a row is filled up with segment 0.

    Args:
        documents: encoded, of at most `row_length` tokens each if they are to stay whole.
        row_length: T+1.
        rest: of a document, to begin with.
        whole: a document that does not fit into the rest of a row begins the next one.

    Attributes:
        rest: of the current document, what starts the next row.
    """

    def __init__(
        self, documents: Iterator[Document], row_length: int, rest: Document | None = None, *, whole: bool = False
    ):
        self._documents = documents
        self._row_length = row_length
        self._whole = whole
        self.rest: Document = {"tokens": np.zeros(0, np.int32)} if rest is None else rest

    def __next__(self) -> Batch:
        """Return {"tokens": int32 [T+1], "segment_ids": int32 [T+1]} and the documents' other arrays; padding is 0."""
        pieces: list[Document] = []
        room = self._row_length
        while room:
            if not len(self.rest["tokens"]):
                self.rest = next(self._documents, self.rest)
            length = len(self.rest["tokens"])
            if not length or (self._whole and length > room):
                break
            size = min(length, room)
            # what goes on in the next row is predicted there from the last id of this one
            kept = size - 1 if size < length else size
            pieces.append({name: value[:size] for name, value in self.rest.items()})
            self.rest = {name: value[kept:] for name, value in self.rest.items()}
            room -= size
        if not pieces:
            raise StopIteration
        row = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        row["segment_ids"] = np.repeat(
            np.arange(1, len(pieces) + 1, dtype=np.int32), [len(piece["tokens"]) for piece in pieces]
        )
        return {name: np.pad(value, (0, room)) for name, value in row.items()}


class _RowStream(grain.IterDataset[Batch]):
    """The training rows of a stream of documents, over and over."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        super().__init__()
        self._config = config
        self._tokenizer = tokenizer

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _RowStreamIterator(self._config, self._tokenizer)


class _RowStreamIterator(grain.DatasetIterator[Batch]):
    """Its state is the position before the current document, and how many ids of that document are done with."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        super().__init__()
        self._config = config
        self._tokenizer = tokenizer
        self.set_state({"position": None, "done": 0})

    def __next__(self) -> Batch:
        return next(self._rows)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position, "done": self._length - len(self._rows.rest["tokens"])}

    def set_state(self, state: dict[str, Any]) -> None:
        self._position: Position = state["position"]
        self._length = 0
        documents = self._repeat(self._position)
        rest = {name: value[state["done"] :] for name, value in next(documents).items()} if state["done"] else None
        whole = self._config.template is not None
        self._rows = RowPacker(documents, self._config.sequence_length + 1, rest, whole=whole)

    def _repeat(self, position: Position) -> Iterator[Document]:
        """Yield the training documents from `position` on, over and over, and keep the state up."""
        encode = _encoder(self._config, self._tokenizer)
        while True:
            for document, after in stream(self._config, "train", position):
                if (encoded := encode(document)) is not None:
                    self._position, self._length = position, len(encoded["tokens"])
                    yield encoded
                position = after
            position = None


def _encoder(config: DataConfig, tokenizer: Tokenizer) -> Callable[[Any], Document | None]:
    """Return what encodes one document of a stream; None is one to leave out."""
    if config.template is not None:
        chat = chat_format(config.template, tokenizer)

        def encode_conversation(conversation: Conversation) -> Document | None:
            fitted = fit(chat.encode(conversation), config.sequence_length + 1)
            return None if fitted is None else fitted._asdict()

        return encode_conversation

    def encode_text(text: str) -> Document | None:
        ids = encode_document(tokenizer, text)
        return {"tokens": ids} if len(ids) > 2 else None  # more than BOS and EOS

    return encode_text


def _encode(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (ids, UTF-8 bytes) of every document that has text, cut off after `max_tokens` targets in all."""
    left = sys.maxsize if max_tokens is None else max_tokens
    for some in itertools.batched(texts, _ENCODED_TOGETHER if max_tokens is None else 1):
        for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
            if not len(ids):
                continue
            size = len(text.encode("utf-8")) if len(ids) <= left else tokenizer.count_bytes(ids[:left])
            yield as_document(tokenizer, ids)[: 1 + left], size
            left -= len(ids) + 1
            if left <= 0:
                return


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return the rows of the global batch that a process has."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} must lie in [0, {process_count})")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    return rows if len(rows) == count else np.pad(rows, ((0, count - len(rows)), (0, 0)))
