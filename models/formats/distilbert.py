"""Hugging Face's DistilBERT (Sanh et al. 2019): BERT without token types and pooler, in fewer layers."""

from collections.abc import Iterator

from phyla.models.config import ModelConfig
from phyla.models.formats.bert import class_name, encoder_block, parts
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, inverse, linear, norm, same
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import MLPConfig


def config(raw: dict) -> ModelConfig:
    """See `Format`."""
    flags = Flags(raw)
    head = parts(flags, "DistilBert")["head"]  # there is no pooler
    activation = flags.choose("activation", ACTIVATIONS, "gelu")
    flags.only("tie_word_embeddings", True)
    width = flags.take("dim", 768)
    expand = flags.take("hidden_dim", 3072) / width
    model = ModelConfig(
        width=width,
        layers=flags.take("n_layers", 6),
        vocab_size=flags.take("vocab_size", 30522),
        pattern=(encoder_block(flags.take("n_heads", 12), expand, activation),),
        learned_positions=flags.take("max_position_embeddings", 512),
        embedding_norm=True,
        head_transform=activation if head else None,
        head_bias=head,
        norm="layernorm",
        norm_epsilon=1e-12,
        norm_position="post",
        final_norm=False,
    )
    # Sinusoidal positions are stored like learned ones.
    flags.done("sinusoidal_pos_embds", "attention_dropout", "dropout", "qa_dropout", "seq_classif_dropout")
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format`."""
    (block,) = model.pattern
    mixer, channel = block.mixer, block.channel
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(channel, MLPConfig)
    return {
        "model_type": "distilbert",
        "architectures": [class_name(model, "DistilBert")],
        "dim": model.width,
        "n_layers": model.layers,
        "n_heads": mixer.heads,
        "hidden_dim": channel.hidden(model),
        "activation": inverse(ACTIVATIONS, channel.activation),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.learned_positions,
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": True,
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format`."""
    base = "distilbert." if model.head_transform else ""
    yield same("embedding.weight", f"{base}embeddings.word_embeddings.weight")
    yield same("position_embedding.weight", f"{base}embeddings.position_embeddings.weight")
    yield from norm("embedding_norm", f"{base}embeddings.LayerNorm", bias=True)
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}.", f"{base}transformer.layer.{i}."
        for name, part in (("q", "q_lin"), ("k", "k_lin"), ("v", "v_lin"), ("o", "out_lin")):
            yield from linear(f"{ours}mixer.{name}", f"{theirs}attention.{part}", bias=True)
        yield from norm(f"{ours}mixer_norm", f"{theirs}sa_layer_norm", bias=True)
        yield from linear(f"{ours}channel.up", f"{theirs}ffn.lin1", bias=True)
        yield from linear(f"{ours}channel.down", f"{theirs}ffn.lin2", bias=True)
        yield from norm(f"{ours}channel_norm", f"{theirs}output_layer_norm", bias=True)
    if model.head_transform:
        yield from linear("head_transform.linear", "vocab_transform", bias=True)
        yield from norm("head_transform.norm", "vocab_layer_norm", bias=True)
        yield same("head_bias", "vocab_projector.bias")


FORMAT = Format(
    name="distilbert",
    config=config,
    to_config=to_config,
    entries=entries,
    tied=("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    buffers=(r"(distilbert\.)?embeddings\.position_ids",),
)
