"""RWKV-7 with the tensor names of its authors (RWKV-LM), whose checkpoints are these tensors and nothing else.

A config.json is therefore optional in all but its `model_type`: `complete` reads the rest off the tensors. The first
block has no value residual; checkpoints that hold its parameters all the same (`blocks.0.att.v0`, `v1` and `v2`, which
no implementation uses) lose them.
"""

import re
from collections.abc import Iterator, Mapping

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry, Flags, Format, norm, reshaped, same, transposed
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config

RANKS = {"decay": "w1", "rate": "a1", "value": "v1", "gate": "g1"}
"""Our names, and the tensors (width, rank)."""
FLAGS = {
    "decay": "decay_low_rank_dim",
    "rate": "a_low_rank_dim",
    "value": "v_low_rank_dim",
    "gate": "gate_low_rank_dim",
}
"""In config.json, where transformers' port says them."""


def complete(raw: dict, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """See `Format.complete`. What config.json says goes before."""
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))]
    # Of the last block: the first one's value rank is of no matter, even if it is there.
    found = {"n_layer": max(blocks, default=0) + 1}
    block = f"blocks.{found['n_layer'] - 1}"
    places = {
        "vocab_size": ("emb.weight", 0),
        "n_embd": ("emb.weight", 1),
        "head_size": (f"{block}.att.r_k", 1),
        "dim_ffn": (f"{block}.ffn.key.weight", 0),
        **{FLAGS[ours]: (f"{block}.att.{theirs}", 1) for ours, theirs in RANKS.items()},
    }
    found |= {flag: shapes[name][axis] for flag, (name, axis) in places.items() if axis < len(shapes.get(name, ()))}
    return found | raw


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width, layers = flags.take("n_embd"), flags.take("n_layer")
    flags.only("dim_att", width)
    ranks = {f"{ours}_rank": flags.take(flag, None) for ours, flag in FLAGS.items()}
    head_dim = flags.take("head_size", 64)
    channel = RWKV7ChannelConfig(expand=flags.take("dim_ffn", 4 * width) / width)
    first, other = (
        BlockConfig(mixer=RWKV7Config(head_dim=head_dim, value_residual=residual, **ranks), channel=channel)
        for residual in (False, True)
    )
    model = ModelConfig(
        width=width,
        layers=layers,
        vocab_size=flags.take("vocab_size"),
        prefix=(first,) if layers > 1 else (),
        pattern=(other if layers > 1 else first,),
        norm="layernorm",
        embedding_norm=True,
        tie_embeddings=False,
    )
    flags.done("ctx_len")
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer, channel = model.pattern[0].mixer, model.pattern[0].channel
    if not isinstance(mixer, RWKV7Config) or not isinstance(channel, RWKV7ChannelConfig):
        raise UserError("the format rwkv7 has RWKV-7's two mixers in every block; this model has not")
    ranks = {FLAGS[ours]: getattr(mixer, f"{ours}_rank") for ours in RANKS}
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.width,
        "n_layer": model.layers,
        "head_size": mixer.head_dim,
        "dim_ffn": channel.hidden(model),
        **{flag: rank for flag, rank in ranks.items() if rank is not None},
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    D = model.width

    def vector(ours: str, theirs: str) -> Entry:
        return reshaped(ours, theirs, (D,), (1, 1, D))

    yield same("embedding.weight", "emb.weight")
    yield from norm("embedding_norm", "blocks.0.ln0", bias=True)
    for i, block in enumerate(model.blocks):
        assert isinstance(block.mixer, RWKV7Config)
        ours, theirs, K = f"blocks.{i}.mixer", f"blocks.{i}.att", block.mixer.head_dim
        yield from norm(f"blocks.{i}.mixer_norm", f"blocks.{i}.ln1", bias=True)
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a"):
            yield vector(f"{ours}.{name}", f"{theirs}.{name}")
        yield reshaped(f"{ours}.r_k", f"{theirs}.r_k", (D,), (D // K, K))
        for name in ("w", "a", "v", "g"):
            if name == "v" and not block.mixer.value_residual:
                continue
            if name != "g":
                yield vector(f"{ours}.{name}0", f"{theirs}.{name}0")
            yield same(f"{ours}.{name}.down.weight", f"{theirs}.{name}1")
            yield same(f"{ours}.{name}.up.weight", f"{theirs}.{name}2")
        for name in ("receptance", "key", "value", "output"):
            yield transposed(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
        yield same(f"{ours}.norm_scale", f"{theirs}.ln_x.weight")
        yield same(f"{ours}.norm_bias", f"{theirs}.ln_x.bias")
        yield from norm(f"blocks.{i}.channel_norm", f"blocks.{i}.ln2", bias=True)
        yield vector(f"blocks.{i}.channel.x_k", f"blocks.{i}.ffn.x_k")
        for name in ("key", "value"):
            yield transposed(f"blocks.{i}.channel.{name}.weight", f"blocks.{i}.ffn.{name}.weight")
    yield from norm("norm", "ln_out", bias=True)
    yield transposed("head.weight", "head.weight")


FORMAT = Format(
    name="rwkv7-reference",
    config=config,
    to_config=to_config,
    entries=entries,
    complete=complete,
    buffers=(r"blocks\.0\.att\.v[012]",),
)
