"""Text to ids and back, with one policy for the ends of a document.

Every document is its text's ids between exactly one `bos_id` and one `eos_id`, so that a model learns to stop; a
prompt has the `bos_id` only. `encode` never adds a special token, and never reads one out of the text:
"<|endoftext|>" in a document is ordinary characters.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from phyla.models.errors import UserError
from phyla.training.data.config import DataConfig
from phyla.training.data.sources import documents
from phyla.training.data.templates import CONFIG_FILE, ChatTemplate, find_template

SEPARATOR = "<|endoftext|>"
BPE_TRAINING_CHARACTERS = 100_000_000
"""How much of the training text a BPE vocabulary is learned from."""

FINGERPRINT_FILE = "tokenizer_fingerprint.json"
TOKENIZER_FILE = "tokenizer.json"

# Names of the token that starts (ends) a document, tried in order where the tokenizer does not say.
_BOS_NAMES = (SEPARATOR, "<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "<|im_start|>")
_MASK_NAMES = ("[MASK]", "<mask>")
_EOS_NAMES = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")


class Tokenizer(Protocol):
    """What the pipeline, the checkpoints and generation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, V; every id is in [0, V)."""
        ...

    @property
    def bos_id(self) -> int:
        """The id in front of every document."""
        ...

    @property
    def eos_id(self) -> int:
        """The id behind every document, at which generation stops; where there is one separator it is `bos_id`."""
        ...

    @property
    def mask_id(self) -> int:
        """The id that hides a token in masked-token training; `vocab_size` where the tokenizer has none of its own."""
        ...

    def special_id(self, name: str) -> int | None:
        """Return the id of the special token of that name; None if there is none."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [L], without any special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, special tokens left out; bytes that are not UTF-8 show as U+FFFD."""
        ...

    def count_bytes(self, ids: np.ndarray) -> int:
        """Return how many UTF-8 bytes of text the ids stand for; special tokens count 0."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return kind, sha256, vocab_size, bos and eos: equal fingerprints give equal ids."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer` needs to the folder."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 at both ends of every document. Any bytes come back exactly."""

    vocab_size = 257
    bos_id = 256
    eos_id = 256
    mask_id = 257  # beyond the vocabulary

    def special_id(self, name: str) -> int | None:
        """Return None: the separator has no name."""
        return None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the bytes of a text, int32 [L]."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the exact bytes of ids, separators left out."""
        values = np.asarray(ids, np.int64)
        return values[values < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids for display: bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def count_bytes(self, ids: np.ndarray) -> int:
        """Return the number of ids that are bytes."""
        return int(np.count_nonzero(ids < 256))

    def fingerprint(self) -> dict[str, Any]:
        """Return kind, sha256, vocab_size, bos and eos."""
        return _fingerprint("bytes", "utf-8 bytes, 256 separates", self)

    def save(self, folder: str | Path) -> None:
        """Write the fingerprint; there is nothing else to know."""
        _write_fingerprint(folder, self.fingerprint())


class HuggingFaceTokenizer:
    """A tokenizer.json of the tokenizers library, trained here or elsewhere.

    `bos_id` and `eos_id` are given (`document_tokens` finds them); the file's own post-processor is never run, so the
    tokens at the ends of a document are neither doubled nor dropped. Truncation and padding that the file asks for
    are switched off.
    """

    def __init__(self, core: tokenizers.Tokenizer, bos_id: int, eos_id: int, chat_template: ChatTemplate | None = None):
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True  # the name of a special token in a text is plain characters
        self._core = core
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.chat_template = chat_template
        masks = (core.token_to_id(name) for name in _MASK_NAMES)
        self.mask_id = next((i for i in masks if i is not None), core.get_vocab_size())
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values()) + 1
        byte_level = isinstance(core.decoder, tokenizers.decoders.ByteLevel)
        self._bytes_V = _byte_lengths(core, self.vocab_size) if byte_level else None
        self.special = {token.content: i for i, token in core.get_added_tokens_decoder().items() if token.special}

    def special_id(self, name: str) -> int | None:
        """Return the id of the special token of that name; None if there is none."""
        return self.special.get(name)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [L], without any special token."""
        return np.asarray(self._core.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_written(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of what a chat template wrote, in which the names of special tokens are those tokens.

        Returns:
            int32 [L], and where in the text each begins and ends, integers [L, 2].
        """
        found = self._reads_special.encode(text, add_special_tokens=False)
        return np.asarray(found.ids, np.int32), np.asarray(found.offsets, np.int64).reshape(-1, 2)

    @functools.cached_property
    def _reads_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._core.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text (the library works on several threads)."""
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, special tokens left out."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=True)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Return the bytes that ids stand for: exact for a byte-level vocabulary, else those of `decode`."""
        if self._bytes_V is not None:
            return int(self._bytes_V[ids].sum())
        return len(self.decode(ids).encode("utf-8"))

    def fingerprint(self) -> dict[str, Any]:
        """Return kind, sha256 of the tokenizer.json, vocab_size, bos and eos."""
        return _fingerprint("tokenizer.json", self._core.to_str(), self)

    def to_json(self) -> str:
        """Return the text of its tokenizer.json."""
        return self._core.to_str()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, the fingerprint and, in a tokenizer_config.json, the chat template."""
        _write_fingerprint(folder, self.fingerprint())
        Path(folder, TOKENIZER_FILE).write_text(self.to_json(), encoding="utf-8")
        if self.chat_template is not None:
            _write_json(Path(folder, CONFIG_FILE), self.chat_template.to_config())


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of the beginning of a document, int32 [1 + L]: one `bos_id`, then the text."""
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)], dtype=np.int32)


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return a document's ids, int32 [1 + L + 1]: one `bos_id`, the text, one `eos_id`."""
    return as_document(tokenizer, tokenizer.encode(text))


def as_document(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Return `encode_document` of the text whose `encode` is `ids`."""
    return np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]], dtype=np.int32)


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer that the config asks for: bytes, trained on the training documents, or read from a file.

    Raises:
        UserError: the file is absent or not a tokenizer.json, or its document policy cannot be known.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer.startswith("bpe:"):
        return train_bpe(documents(config, "train"), int(config.tokenizer.removeprefix("bpe:")))
    path = Path(config.tokenizer)
    core = _read_core(path, "data.tokenizer")
    return HuggingFaceTokenizer(core, *document_tokens(core, path), find_template(path.parent))


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Learn a byte-level BPE vocabulary (Sennrich et al. 2016, on bytes as in GPT-2); every text comes back exactly.

    The first `BPE_TRAINING_CHARACTERS` characters are read. Equal texts give equal vocabularies. A short text may
    give fewer than `vocab_size` tokens.
    """
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_first_characters(texts, BPE_TRAINING_CHARACTERS), trainer)
    return HuggingFaceTokenizer(core, 0, 0)  # special tokens have the first ids


def document_tokens(core: tokenizers.Tokenizer, path: Path) -> tuple[int, int]:
    """Return (bos_id, eos_id) of the tokenizer.json at `path`.

    BOS is the first there is of: the token that the file's post-processor puts in front of a text, the `bos_token` of
    a tokenizer_config.json beside it, a special token of a well-known name, EOS. EOS likewise, behind a text, and BOS
    in the end.

    Raises:
        UserError: there is none of these, or the post-processor puts several tokens in front or behind.
    """
    before, after = _added_tokens(core)
    if max(len(before), len(after)) > 1:
        raise UserError(
            f"data.tokenizer: {path} puts {len(before)} tokens in front of a text and {len(after)} behind it; "
            "one of each at most is supported"
        )
    side = path.with_name(CONFIG_FILE)
    config = json.loads(side.read_text(encoding="utf-8")) if side.exists() else {}
    special = {token.content: i for i, token in core.get_added_tokens_decoder().items() if token.special}

    def named(key: str, known: Sequence[str]) -> list[int]:
        said = config.get(key)  # "<s>", or {"content": "<s>", ...}, or null
        said = said["content"] if isinstance(said, dict) else said
        said_id = core.token_to_id(said) if said else None
        return ([] if said_id is None else [said_id]) + [special[name] for name in known if name in special]

    eos = [*after, *named("eos_token", _EOS_NAMES)]
    bos = [*before, *named("bos_token", _BOS_NAMES), *eos]
    if not bos:
        raise UserError(
            f"data.tokenizer: {path} has no special token, such as {SEPARATOR!r}, to put in front of a document"
        )
    return bos[0], (eos or bos)[0]


def _added_tokens(core: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts in front of a text and behind it."""
    for probe in ("a", "A", "0"):  # one that the vocabulary has
        if plain := core.encode(probe, add_special_tokens=False).ids:
            full = core.encode(probe, add_special_tokens=True).ids
            front = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
            return full[:front], full[front + len(plain) :]
    return [], []


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer that `save` wrote to a folder.

    Raises:
        UserError: the folder holds none, or its tokenizer.json is not the one that was saved.
    """
    path = Path(folder, FINGERPRINT_FILE)
    if not path.exists():
        raise UserError(f"{folder}: no {FINGERPRINT_FILE}, so no tokenizer was saved here")
    expected = json.loads(path.read_text(encoding="utf-8"))
    if expected["kind"] == "bytes":
        found: Tokenizer = ByteTokenizer()
    else:
        core = _read_core(Path(folder, TOKENIZER_FILE), str(folder))
        found = HuggingFaceTokenizer(core, expected["bos"], expected["eos"], find_template(Path(folder)))
    check_match(expected, found.fingerprint())
    return found


def check_match(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise UserError, in one line that shows both, unless two fingerprints are equal."""
    if expected != found:
        raise UserError(
            f"the tokenizer is not the one of this run: expected {_describe(expected)}, found {_describe(found)}"
        )


def _describe(fingerprint: dict[str, Any]) -> str:
    shown = {**fingerprint, "sha256": str(fingerprint.get("sha256"))[:12]}
    return "(" + ", ".join(f"{key} {value}" for key, value in shown.items()) + ")"


def _fingerprint(kind: str, content: str, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "kind": kind,
        "sha256": hashlib.sha256(content.encode("utf-8")).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
    }


def _write_fingerprint(folder: str | Path, fingerprint: dict[str, Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_json(Path(folder, FINGERPRINT_FILE), fingerprint)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_core(path: Path, place: str) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{place}: no file {str(path)!r} ('bytes', 'bpe:SIZE' or the path of a tokenizer.json)")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{place}: {path} is not a Hugging Face tokenizer.json ({error})") from error


def _byte_lengths(core: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """Return the number of bytes of each token, int64 [V]: one per character of its byte-level spelling."""
    lengths_V = np.zeros(vocab_size, np.int64)
    for token, i in core.get_vocab(with_added_tokens=False).items():
        lengths_V[i] = len(token)
    for i, token in core.get_added_tokens_decoder().items():  # these are spelled as they are
        lengths_V[i] = 0 if token.special else len(token.content.encode("utf-8"))
    return lengths_V


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
