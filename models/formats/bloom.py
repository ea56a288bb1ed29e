"""BLOOM (BigScience 2022): ALiBi, a normalised embedding, queries, keys and values interleaved by head."""

from collections.abc import Iterator

import numpy as np

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Arrays, Entry, Flags, Format, linear, norm, same
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    flags.only("apply_residual_connection_post_layernorm", False)
    flags.only("n_inner", None)
    flags.only("skip_bias_add_qkv", False)
    heads = flags.take("num_attention_heads", flags.take("n_head", 8))
    model = ModelConfig(
        width=flags.take("n_embed", flags.take("hidden_size", 64)),  # the released models say n_embed
        layers=flags.take("num_hidden_layers", flags.take("n_layer", 2)),
        vocab_size=flags.take("vocab_size"),
        embedding_norm=True,
        tie_embeddings=flags.take("tie_word_embeddings", True),
        norm="layernorm",
        norm_epsilon=flags.take("layer_norm_epsilon", 1e-5),
        pattern=(
            BlockConfig(
                mixer=AttentionConfig(heads=heads, positions="alibi", qkv_bias=True, out_bias=True),
                channel=MLPConfig(activation="gelu_tanh", bias=True),
            ),
        ),
    )
    flags.done(
        *("attention_dropout", "hidden_dropout", "attention_softmax_in_fp32", "masked_softmax_fusion"),
        *("bias_dropout_fusion", "offset_alibi", "seq_length", "skip_bias_add", "slow_but_exact"),
    )
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer, channel = model.pattern[0].mixer, model.pattern[0].channel
    if not isinstance(mixer, AttentionConfig) or not isinstance(channel, MLPConfig):
        raise UserError("BLOOM has attention and an MLP in every block; this model has not")
    if isinstance(channel, GatedMLPConfig):
        raise UserError("BLOOM has no gated MLP; this model's is gated")
    return {
        "architectures": ["BloomForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "n_layer": model.layers,
        "n_head": mixer.heads,
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def interleaved(ours: list[str], theirs: str, heads: int) -> Entry:
    """Queries, keys and values: theirs ((head, 3, head_dim), in) or a vector of that; ours (in, heads · head_dim)."""

    def read(x: np.ndarray) -> Arrays:
        split = x.reshape(heads, 3, -1, *x.shape[1:])
        return tuple(split[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))

    def write(*parts: np.ndarray) -> Arrays:
        rows = [part.T.reshape(heads, -1, *part.T.shape[1:]) for part in parts]
        return (np.stack(rows, axis=1).reshape(-1, *parts[0].T.shape[1:]),)

    return Entry(tuple(ours), (theirs,), read, write)


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    mixer = model.pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    yield same("embedding.weight", "transformer.word_embeddings.weight")
    yield from norm("embedding_norm", "transformer.word_embeddings_layernorm", bias=True)
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        yield from norm(f"{ours}.mixer_norm", f"{theirs}.input_layernorm", bias=True)
        for part in ("weight", "bias"):
            qkv = [f"{ours}.mixer.{name}.{part}" for name in "qkv"]
            yield interleaved(qkv, f"{theirs}.self_attention.query_key_value.{part}", mixer.heads)
        yield from linear(f"{ours}.mixer.o", f"{theirs}.self_attention.dense", bias=True)
        yield from norm(f"{ours}.channel_norm", f"{theirs}.post_attention_layernorm", bias=True)
        yield from linear(f"{ours}.channel.up", f"{theirs}.mlp.dense_h_to_4h", bias=True)
        yield from linear(f"{ours}.channel.down", f"{theirs}.mlp.dense_4h_to_h", bias=True)
    yield from norm("norm", "transformer.ln_f", bias=True)
    if not model.tie_embeddings:
        yield from linear("head", "lm_head")


FORMAT = Format(
    name="bloom",
    config=config,
    to_config=to_config,
    entries=entries,
    optional_prefix="transformer.",
    tied=("lm_head.weight", "transformer.word_embeddings.weight"),
)
