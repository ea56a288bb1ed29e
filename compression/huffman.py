"""Canonical Huffman codes of arrays of bytes, and a file of such arrays.

An array is a string of symbols: its bytes, or their halves. Where one symbol is more frequent than all others together
it is not written: each other one comes with the number of those before it, from 0 to 255. Longer runs are broken by
one that is written (the filler zeros of Han et al. 2016, arXiv 1510.00149, section 2). Of these forms the shortest is
taken. Symbols and run lengths have codes of their own.

All is done by numpy, a string at a time: blocks of 2,048 symbols begin at whole bytes that are known, so that all of
them are decoded side by side, a symbol of each at a time.

| file | |
|---|---|
| magic | 8 bytes |
| size of the header | 8 bytes, little endian |
| header | JSON: of each array its path, dtype, shape and form |
| streams | of each array one or two: 128 bytes of code lengths, 4 bits each; 2 bytes for each block; the blocks |
"""

import heapq
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from phyla.models.errors import UserError

MAGIC = b"phyla-h1"
LONGEST = 15
"""Bits of a code: its length takes 4 bits, and a table of all windows of so many bits stays in a cache."""
BLOCK = 2048
"""Symbols: less than 2^16 bytes, whose number is then 1/128 of a bit for each symbol."""
TOGETHER = 512
"""Blocks that are encoded at once: 16 MiB."""
RUN = 256
"""Of a filler: 255 that are not written and one that is."""


class Form(NamedTuple):
    """How an array becomes symbols."""

    bits: int
    """Of a symbol: 8 or 4."""
    frequent: int | None
    """The symbol that is not written; None: all are."""


def encode(array: np.ndarray) -> tuple[Form, bytes]:
    """The shortest of the forms, and the streams one after another. The items of the array are bytes."""
    data = np.ascontiguousarray(array).view(np.uint8).ravel()
    best: tuple[Form, bytes] | None = None
    for bits in (8, 4):
        symbols = _symbols(data, bits)
        counts = np.bincount(symbols, minlength=256)
        most = int(counts.argmax())
        forms = [Form(bits, None), *([Form(bits, most)] if 2 * counts[most] > len(symbols) else [])]
        for form in forms:
            streams = [symbols] if form.frequent is None else _without(symbols, form.frequent)
            sizes = sum(_size(stream) for stream in streams)
            if best is None or sizes < len(best[1]):
                best = form, b"".join(map(encode_stream, streams))
    assert best is not None
    return best


def decode(form: Form, data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """What `encode` was given."""
    count = math.prod(shape) * 8 // form.bits
    values, end = decode_stream(data)
    if form.frequent is not None:
        runs, _ = decode_stream(data[end:])
        values = _with(values, runs, form.frequent, count)
    if form.bits == 4:
        values = values[::2] | values[1::2] << 4
    return values.view(dtype).reshape(shape)


def entropy(array: np.ndarray, bits: int) -> float:
    """Bytes that no code can go below that codes symbols of so many bits one by one, its tables not counted."""
    counts = np.bincount(_symbols(np.ascontiguousarray(array).view(np.uint8).ravel(), bits))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * counts.sum() / 8)


def _symbols(data: np.ndarray, bits: int) -> np.ndarray:
    return data if bits == 8 else np.stack([data & 15, data >> 4], 1).ravel()


def _without(symbols: np.ndarray, frequent: int) -> list[np.ndarray]:
    """The other symbols and fillers, and before each the number of the frequent ones."""
    (at,) = np.nonzero(symbols != frequent)
    before = np.diff(at, prepend=-1) - 1
    fillers = before // RUN
    places = np.cumsum(fillers + 1) - 1
    count = int(places[-1]) + 1 if len(places) else 0
    values, runs = np.full(count, frequent, np.uint8), np.full(count, RUN - 1, np.uint8)
    values[places], runs[places] = symbols[at], before % RUN
    return [values, runs]


def _with(values: np.ndarray, runs: np.ndarray, frequent: int, count: int) -> np.ndarray:
    symbols = np.full(count, frequent, np.uint8)
    symbols[np.cumsum(runs.astype(np.int64) + 1) - 1] = values
    return symbols


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Bits of the code of each of 256 symbols, 0 where the count is 0: the best of codes of at most LONGEST bits.

    By package-merge (Larmore and Hirschberg 1990); a single symbol has 1 bit.
    """
    lengths = np.zeros(256, np.uint8)
    (used,) = np.nonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
    if len(used) < 2:
        return lengths
    leaves = sorted((int(counts[symbol]), (int(symbol),)) for symbol in used)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LONGEST):
        merged = list(heapq.merge(leaves, packages))
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2], strict=False)]
    for _, symbols in packages[: len(used) - 1]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def _codes(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symbols in the order of their codes, and each symbol's code in the highest of LONGEST bits (canonical)."""
    order = np.lexsort((np.arange(256), lengths))
    order = order[lengths[order] > 0]
    widths = 1 << LONGEST - lengths[order].astype(np.int64)
    codes = np.zeros(256, np.uint16)
    codes[order] = np.cumsum(widths) - widths
    return order, codes


def _size(symbols: np.ndarray) -> int:
    """Bytes of `encode_stream`, but for the last bits of blocks."""
    counts = np.bincount(symbols, minlength=256)
    return 136 + 2 * -(-len(symbols) // BLOCK) + int((counts * code_lengths(counts).astype(np.int64)).sum()) // 8


def encode_stream(symbols: np.ndarray) -> bytes:
    """Symbols, uint8 [N], as N in 8 bytes, the code lengths, the blocks' bytes, the blocks."""
    lengths = code_lengths(np.bincount(symbols, minlength=256))
    _, codes = _codes(lengths)
    blocks, sizes = [], []
    for start in range(0, len(symbols), BLOCK * TOGETHER):
        part = symbols[start : start + BLOCK * TOGETHER]
        short = -len(part) % BLOCK
        code = np.pad(codes[part] << 16 - LONGEST, (0, short)).reshape(-1, BLOCK)
        length = np.pad(lengths[part], (0, short)).reshape(-1, BLOCK)
        total = length.sum(1, dtype=np.int64)
        # As one more code of zeros, what is missing to whole bytes.
        length = np.concatenate([length, -total[:, None] % 8], 1).astype(np.uint8)
        code = np.pad(code, ((0, 0), (0, 1)))
        bits = np.unpackbits(code.astype(">u2").view(np.uint8)).reshape(-1, 16)
        blocks.append(np.packbits(bits[np.arange(16) < length.reshape(-1, 1)]))
        sizes.append((total + 7) // 8)
    of_blocks = np.concatenate([np.zeros(0, np.int64), *sizes]).astype("<u2").tobytes()
    table = (lengths[::2] | lengths[1::2] << 4).tobytes()
    return len(symbols).to_bytes(8, "little") + table + of_blocks + b"".join(block.tobytes() for block in blocks)


def decode_stream(data: bytes) -> tuple[np.ndarray, int]:
    """The symbols of `encode_stream` and the number of its bytes; what follows them is not read."""
    count = int.from_bytes(data[:8], "little")
    table = np.frombuffer(data, np.uint8, 128, 8)
    lengths = np.stack([table & 15, table >> 4], 1).ravel()
    blocks, begin = -(-count // BLOCK), 136
    sizes = np.frombuffer(data, "<u2", blocks, begin).astype(np.int64)
    begin += 2 * blocks
    end = begin + int(sizes.sum())
    order, _ = _codes(lengths)
    of_window = np.zeros(1 << LONGEST, np.uint16)  # of all that begin with a code its symbol and its length
    entries = np.repeat(order | lengths[order].astype(np.int64) << 8, 1 << LONGEST - lengths[order].astype(np.int64))
    of_window[: len(entries)] = entries
    padded = np.frombuffer(data[begin:end] + bytes(4), np.uint8)
    words = np.ndarray((len(padded) - 3,), ">u4", padded, strides=(1,))  # one from each byte on
    symbols = np.zeros((BLOCK, blocks), np.uint8)
    at = 8 * (np.cumsum(sizes) - sizes)
    last = 8 * (len(padded) - 4)
    for row in symbols:
        window = words[at >> 3].astype(np.uint32) >> (32 - LONGEST - (at & 7)).astype(np.uint32)
        entry = of_window[window & (1 << LONGEST) - 1]
        row[:] = entry & 255
        at += entry >> 8
        np.minimum(at, last, out=at)  # the last block is short, and what is read after its end not used
    return symbols.T.ravel()[:count], end


class Sizes(NamedTuple):
    """Of an array, in bytes."""

    raw: int
    coded: int
    entropy: float


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Sizes]:
    """Writes a file of arrays whose items are bytes, by name; the sizes. The whole file is written or none."""
    header: list[dict[str, Any]] = []
    found = {}
    temporary = path.with_name(path.name + ".tmp")
    streams = []
    for name, array in arrays.items():
        form, data = encode(array)
        header.append(
            {"name": name, "dtype": array.dtype.name, "shape": array.shape, **form._asdict()}
            | {"bytes": len(data), "crc32": zlib.crc32(data)}
        )
        streams.append(data)
        found[name] = Sizes(array.nbytes, len(data), entropy(array, form.bits))
    said = json.dumps(header, separators=(",", ":")).encode()
    with temporary.open("wb") as file:
        file.write(MAGIC + len(said).to_bytes(8, "little") + said)
        file.writelines(streams)
    os.replace(temporary, path)
    return found


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by name. Raises UserError if it is none, or is damaged."""
    found = {}
    with path.open("rb") as file:
        if file.read(8) != MAGIC:
            raise UserError(f"{path} is no file of Huffman codes")
        for each in json.loads(file.read(int.from_bytes(file.read(8), "little"))):
            data = file.read(each["bytes"])
            if zlib.crc32(data) != each["crc32"]:
                raise UserError(f"{path} is damaged: {each['name']} is not what was written")
            dtype = np.dtype(getattr(ml_dtypes, each["dtype"], each["dtype"]))
            found[each["name"]] = decode(Form(each["bits"], each["frequent"]), data, dtype, tuple(each["shape"]))
    return found
