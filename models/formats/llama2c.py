"""llama2.c's .bin files (its first format, float32) with the tokenizer.bin, or tok512.bin, beside them."""

import math
import struct
from pathlib import Path

import numpy as np

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats import gguf, llama
from phyla.models.formats.source import Source, Vocabulary
from phyla.models.formats.vocabulary import SPACE, sentencepiece
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig

HEADER = struct.Struct("<7i")
NAMES = {
    "embedding": "token_embedding",
    "mixer_norm": "rms_att.{}",
    "mixer.q": "wq.{}",
    "mixer.k": "wk.{}",
    "mixer.v": "wv.{}",
    "mixer.o": "wo.{}",
    "channel_norm": "rms_ffn.{}",
    "channel.gate": "w1.{}",
    "channel.down": "w2.{}",
    "channel.up": "w3.{}",
    "norm": "rms_final",
    "head": "wcls",
}


def open_file(path: Path) -> Source:
    """Opens a file. Raises UserError if its size is not what its header says."""
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size:
        raise UserError(f"{path} is too short for a llama2.c file")
    width, hidden, layers, heads, kv_heads, vocab, length = HEADER.unpack(start)
    if start[:4] == b"24ka" or min(width, hidden, layers, heads, kv_heads, length) < 1 or not vocab or width % heads:
        raise UserError(f"{path} is not a llama2.c file of the first format (seven sizes, then float32)")
    tied, vocab = vocab > 0, abs(vocab)
    head_dim = width // heads
    # In the file's order; those with a {} once for each layer, all layers of one before the next.
    order = {
        "embedding": (vocab, width),
        "mixer_norm": (width,),
        "mixer.q": (width, width),
        "mixer.k": (kv_heads * head_dim, width),
        "mixer.v": (kv_heads * head_dim, width),
        "mixer.o": (width, width),
        "channel_norm": (width,),
        "channel.gate": (hidden, width),
        "channel.down": (width, hidden),
        "channel.up": (hidden, width),
        "norm": (width,),
        "rotations": (2, length, head_dim // 2),  # cosines and sines, which nothing needs
        **({} if tied else {"head": (vocab, width)}),
    }
    shapes, offsets, end = {}, {}, HEADER.size
    for part, shape in order.items():
        template = NAMES.get(part, part)
        for i in range(layers if "{}" in template else 1):
            name = f"{template.format(i)}.weight"
            shapes[name], offsets[name] = shape, end
            end += 4 * math.prod(shape)
    if path.stat().st_size != end:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; as a llama2.c file it would have {end:,}")
    del shapes["rotations.weight"]
    mixer = AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    model = ModelConfig(
        width=width,
        layers=layers,
        vocab_size=vocab,
        tie_embeddings=tied,
        norm_epsilon=1e-5,
        pattern=(BlockConfig(mixer=mixer, channel=GatedMLPConfig(expand=hidden / width)),),
    )

    def read(name: str) -> np.ndarray:
        array = np.fromfile(path, "<f4", count=math.prod(shapes[name]), offset=offsets[name])
        return array.reshape(shapes[name])

    entries = list(llama.entries(model, NAMES, gguf.interleaved(head_dim)))
    return Source(path, model, entries, shapes, read, read_vocabulary(path, vocab))


def read_vocabulary(path: Path, vocab: int) -> Vocabulary | None:
    """The tok<V>.bin or tokenizer.bin in the file's folder; None if there is neither."""
    found = next(
        (each for name in (f"tok{vocab}.bin", "tokenizer.bin") if (each := path.with_name(name)).exists()), None
    )
    if found is None:
        return None
    data, at = found.read_bytes(), 4  # behind the length of the longest token
    tokens, scores = [], []
    try:
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", data, at)
            tokens.append(data[at + 8 : at + 8 + length].decode().replace(" ", SPACE))
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{found} is not a llama2.c tokenizer of {vocab} tokens") from error
    tokens[1:3] = "<s>", "</s>"  # written with line breaks around them
    return Vocabulary(sentencepiece(tokens, scores, 0, [1, 2]), 1, 2)
