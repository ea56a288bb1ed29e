"""GGUF files of the llama architecture: quantized tensors become float32, and the tokenizer inside is used.

The package `gguf` reads the file (an optional dependency: `pip install 'phyla[gguf]'`).
"""

from pathlib import Path
from typing import Any

import numpy as np

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats import llama
from phyla.models.formats.source import Source, Vocabulary
from phyla.models.formats.table import Entry, Flags
from phyla.models.formats.vocabulary import byte_level, sentencepiece
from phyla.models.mixers.attention import AttentionConfig, RopeScaling
from phyla.models.mlp import GatedMLPConfig

NAMES = {
    "embedding": "token_embd",
    "mixer_norm": "blk.{}.attn_norm",
    "mixer.q": "blk.{}.attn_q",
    "mixer.k": "blk.{}.attn_k",
    "mixer.v": "blk.{}.attn_v",
    "mixer.o": "blk.{}.attn_output",
    "channel_norm": "blk.{}.ffn_norm",
    "channel.gate": "blk.{}.ffn_gate",
    "channel.up": "blk.{}.ffn_up",
    "channel.down": "blk.{}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
ROPE_FACTORS = "rope_freqs.weight"
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Special tokens, and what chat templates call them."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of tokens


def interleaved(head_dim: int) -> Any:
    """Entries of a projection whose rows RoPE turns: (2i, 2i + 1) together in the file, (i, i + H/2) here."""

    def to_halves(x: np.ndarray) -> tuple[np.ndarray]:
        return (x.reshape(-1, head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape).T,)

    def to_pairs(x: np.ndarray) -> tuple[np.ndarray]:
        x = x.T
        return (x.reshape(-1, 2, head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape),)

    def entries(ours: str, theirs: str, *, bias: bool = False) -> list[Entry]:
        parts = ["weight"] + ["bias"] * bias
        return [Entry((f"{ours}.{part}",), (f"{theirs}.{part}",), to_halves, to_pairs) for part in parts]

    return entries


def open_file(path: Path) -> Source:
    """Opens a file.

    Raises UserError if the package is absent, the file is not GGUF or of another architecture, or a flag, tensor or
    tokenizer is of an unknown kind, naming it.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF needs the package gguf: pip install 'phyla[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in stored.items()}

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{path}: tensor {name} is {tensor.tensor_type.name}, which cannot be read") from error
        return array.astype(np.float32, copy=False).reshape(shapes[name])

    try:
        factors = read(ROPE_FACTORS) if ROPE_FACTORS in stored else None
        model = config(fields, shapes, factors)
        vocabulary = read_vocabulary(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    mixer = model.pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    entries = list(llama.entries(model, NAMES, interleaved(mixer.resolved_head_dim(model))))
    shapes = {name: shape for name, shape in shapes.items() if name != ROPE_FACTORS}
    return Source(path, model, entries, shapes, read, vocabulary)


def config(fields: dict, shapes: dict[str, tuple[int, ...]], rope_factors: np.ndarray | None) -> ModelConfig:
    """The model that the metadata say. Raises UserError naming an unknown one."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"general.architecture is {architecture!r}; supported: 'llama'")
    flags = Flags({name: value for name, value in fields.items() if name.startswith("llama.")})
    width, heads = flags.take("llama.embedding_length"), flags.take("llama.attention.head_count")
    head_dim = flags.take("llama.attention.key_length", width // heads)
    flags.only("llama.attention.value_length", head_dim)
    flags.only("llama.rope.dimension_count", head_dim)
    flags.only("llama.expert_count", 0)
    flags.only("llama.expert_used_count", 0)
    scaling = RopeScaling()
    if flags.choose("llama.rope.scaling.type", {"none": False, "linear": True}, "none"):
        scaling = RopeScaling(factor=flags.take("llama.rope.scaling.factor"))
    if rope_factors is not None:
        scaling = llama3_scaling(rope_factors, head_dim, flags.take("llama.rope.freq_base", 10_000.0))
    mixer = AttentionConfig(
        heads=heads,
        kv_heads=flags.take("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_base=flags.take("llama.rope.freq_base", 10_000.0),
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
    )
    channel = GatedMLPConfig(
        expand=flags.take("llama.feed_forward_length") / width, bias="blk.0.ffn_gate.bias" in shapes
    )
    tokens = shapes.get("token_embd.weight", (None,))[0]
    model = ModelConfig(
        width=width,
        layers=flags.take("llama.block_count"),
        vocab_size=flags.take("llama.vocab_size", tokens),
        tie_embeddings="output.weight" not in shapes,
        norm_epsilon=flags.take("llama.attention.layer_norm_rms_epsilon"),
        pattern=(BlockConfig(mixer=mixer, channel=channel),),
    )
    flags.done("llama.context_length", "llama.tensor_data_layout")
    return model


def llama3_scaling(factors: np.ndarray, head_dim: int, base: float) -> RopeScaling:
    """The scaling of Llama 3.1 and later, of which a file holds only the frequencies' divisors.

    Raises UserError if these are not what its usual numbers (1 and 4 turns in 8192 tokens) give.
    """
    scaling = RopeScaling(factor=float(factors.max()), original_length=8192)
    turns = 8192 / (2 * np.pi) * float(base) ** (-np.arange(head_dim // 2) / (head_dim // 2))
    slowed = np.clip((scaling.high_frequency - turns) / (scaling.high_frequency - scaling.low_frequency), 0, 1)
    if not np.allclose(1 / factors, slowed / scaling.factor + (1 - slowed), rtol=1e-4):
        raise UserError(f"tensor {ROPE_FACTORS} is not Llama 3's scaling of RoPE, the only one supported")
    return scaling


def read_vocabulary(fields: dict) -> Vocabulary | None:
    """The tokenizer; None if there is none. Raises UserError naming an unknown kind."""
    prefix = "tokenizer.ggml."
    said = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    if "tokens" not in said:
        return None
    tokens, kinds = said["tokens"], said.get("token_type") or [NORMAL] * len(said["tokens"])
    special = [i for i, kind in enumerate(kinds) if kind == CONTROL]
    added = [i for i, kind in enumerate(kinds) if kind == USER_DEFINED]
    eos = said.get("eos_token_id", said.get("bos_token_id"))
    bos = said.get("bos_token_id", eos)
    if bos is None or eos is None:
        raise UserError(f"{prefix}bos_token_id and eos_token_id are both absent")
    if said.get("model") == "gpt2":
        core = byte_level(tokens, said["merges"], said.get("pre", "gpt-2"), special, added)
    elif said.get("model") == "llama":
        core = sentencepiece(
            tokens,
            said["scores"],
            said.get("unknown_token_id", 0),
            special,
            added=added,
            space_prefix=said.get("add_space_prefix", True),
        )
    else:
        raise UserError(f"{prefix}model is {said.get('model')!r}; supported: 'gpt2', 'llama'")
    ids = ((name, said.get(f"{key}_token_id")) for key, name in NAMED.items())
    names = tuple((name, tokens[i]) for name, i in ids if i is not None)
    return Vocabulary(core, bos, eos, fields.get("tokenizer.chat_template"), names)
