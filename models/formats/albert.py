"""Hugging Face's ALBERT (Lan et al. 2020): BERT with factorised embeddings and blocks that share their parameters."""

from collections.abc import Iterator

from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.bert import class_name, encoder_block, parts
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, inverse, linear, norm, same
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import MLPConfig


def config(raw: dict) -> ModelConfig:
    """See `Format`."""
    flags = Flags(raw)
    wanted = parts(flags, "Albert")
    activation = flags.choose("hidden_act", ACTIVATIONS, "gelu_new")
    flags.only("position_embedding_type", "absolute")
    flags.only("tie_word_embeddings", True)
    flags.only("down_scale_factor", 1)
    width = flags.take("hidden_size", 4096)
    expand = flags.take("intermediate_size", 16384) / width
    layers, groups, inner = (
        flags.take(key, default)
        for key, default in (("num_hidden_layers", 12), ("num_hidden_groups", 1), ("inner_group_num", 1))
    )
    if layers % groups:
        raise UserError(f"num_hidden_groups {groups} does not divide num_hidden_layers {layers}")
    model = ModelConfig(
        width=width,
        layers=layers * inner,
        groups=groups,
        vocab_size=flags.take("vocab_size", 30000),
        embedding_width=flags.take("embedding_size", 128),
        pattern=(encoder_block(flags.take("num_attention_heads", 64), expand, activation),) * inner,
        learned_positions=flags.take("max_position_embeddings", 512),
        token_types=flags.take("type_vocab_size", 2),
        embedding_norm=True,
        head_transform=activation if wanted["head"] else None,
        head_bias=wanted["head"],
        pooler=wanted["pooler"],
        norm="layernorm",
        norm_epsilon=flags.take("layer_norm_eps", 1e-12),
        norm_position="post",
        final_norm=False,
    )
    dropouts = "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout_prob"
    flags.done(*dropouts, "net_structure_type", "gap_size", "num_memory_blocks")  # of the TensorFlow release; unused
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format`."""
    mixer, channel = model.pattern[0].mixer, model.pattern[0].channel
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(channel, MLPConfig)
    return {
        "model_type": "albert",
        "architectures": [class_name(model, "Albert")],
        "hidden_size": model.width,
        "embedding_size": model.embedding_width,
        "num_hidden_layers": model.repeats,
        "num_hidden_groups": model.groups,
        "inner_group_num": len(model.pattern),
        "num_attention_heads": mixer.heads,
        "intermediate_size": channel.hidden(model),
        "hidden_act": inverse(ACTIVATIONS, channel.activation),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.learned_positions,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": True,
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format`."""
    base = "albert." if model.head_transform else ""
    for ours, theirs in (("", "word"), ("position_", "position"), ("type_", "token_type")):
        yield same(f"{ours}embedding.weight", f"{base}embeddings.{theirs}_embeddings.weight")
    yield from norm("embedding_norm", f"{base}embeddings.LayerNorm", bias=True)
    yield from linear("embedding_projection", f"{base}encoder.embedding_hidden_mapping_in", bias=True)
    groups = model.groups or model.repeats
    for group in range(groups):
        for j in range(len(model.pattern)):
            # The first block that uses the parameters stands for all.
            ours = f"blocks.{group * (model.layers // groups) + j}."
            theirs = f"{base}encoder.albert_layer_groups.{group}.albert_layers.{j}."
            for name, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "dense")):
                yield from linear(f"{ours}mixer.{name}", f"{theirs}attention.{part}", bias=True)
            yield from norm(f"{ours}mixer_norm", f"{theirs}attention.LayerNorm", bias=True)
            yield from linear(f"{ours}channel.up", f"{theirs}ffn", bias=True)
            yield from linear(f"{ours}channel.down", f"{theirs}ffn_output", bias=True)
            yield from norm(f"{ours}channel_norm", f"{theirs}full_layer_layer_norm", bias=True)
    if model.pooler:
        yield from linear("pooler", f"{base}pooler", bias=True)
    if model.head_transform:
        yield from linear("head_transform.linear", "predictions.dense", bias=True)
        yield from norm("head_transform.norm", "predictions.LayerNorm", bias=True)
        yield same("head_bias", "predictions.bias")


FORMAT = Format(
    name="albert",
    config=config,
    to_config=to_config,
    entries=entries,
    tied=("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    # The sentence-order head is not kept.
    buffers=(r"(albert\.)?embeddings\.position_ids", r"sop_classifier\..*", r"predictions\.decoder\.bias"),
)
