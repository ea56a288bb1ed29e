"""Hugging Face's BERT: a bidirectional encoder (Devlin et al. 2019): bare, or with its heads."""

from collections.abc import Iterator

from phyla.models.config import Activation, BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, inverse, linear, norm, same
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import MLPConfig


def encoder_block(heads: int, expand: float, activation: Activation) -> BlockConfig:
    """Bidirectional attention and an MLP, with all biases and without position encoding."""
    mixer = AttentionConfig(heads=heads, positions="none", causal=False, qkv_bias=True, out_bias=True)
    return BlockConfig(mixer=mixer, channel=MLPConfig(expand=expand, activation=activation, bias=True))


def parts(flags: Flags, family: str) -> dict:
    """What the class named by `architectures` adds to the encoder: fields of ModelConfig.

    Raises UserError for another class than the bare model, ForMaskedLM and ForPreTraining.
    """
    name = flags.take("architectures", [f"{family}Model"])[0]
    known = {
        f"{family}Model": {"pooler": True, "head": False},
        f"{family}ForMaskedLM": {"pooler": False, "head": True},
        f"{family}ForPreTraining": {"pooler": True, "head": True},
    }
    if name not in known:
        raise UserError(f"architectures is {name!r}; supported: {', '.join(known)}")
    return known[name]


def class_name(model: ModelConfig, family: str) -> str:
    """The inverse of `parts`."""
    if model.head_transform is None:
        return f"{family}Model"
    return f"{family}ForPreTraining" if model.pooler else f"{family}ForMaskedLM"


def config(raw: dict) -> ModelConfig:
    """See `Format`."""
    flags = Flags(raw)
    wanted = parts(flags, "Bert")
    activation = flags.choose("hidden_act", ACTIVATIONS, "gelu")
    flags.only("position_embedding_type", "absolute")
    for key in ("is_decoder", "add_cross_attention"):
        flags.only(key, False)
    flags.only("tie_word_embeddings", True)
    width = flags.take("hidden_size", 768)
    expand = flags.take("intermediate_size", 3072) / width
    model = ModelConfig(
        width=width,
        layers=flags.take("num_hidden_layers", 12),
        vocab_size=flags.take("vocab_size", 30522),
        pattern=(encoder_block(flags.take("num_attention_heads", 12), expand, activation),),
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
    flags.done("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout")
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format`."""
    (block,) = model.pattern
    mixer, channel = block.mixer, block.channel
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(channel, MLPConfig)
    return {
        "model_type": "bert",
        "architectures": [class_name(model, "Bert")],
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
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
    base = "bert." if model.head_transform else ""
    for ours, theirs in (("", "word"), ("position_", "position"), ("type_", "token_type")):
        yield same(f"{ours}embedding.weight", f"{base}embeddings.{theirs}_embeddings.weight")
    yield from norm("embedding_norm", f"{base}embeddings.LayerNorm", bias=True)
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}.", f"{base}encoder.layer.{i}."
        for name, part in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("o", "output.dense")):
            yield from linear(f"{ours}mixer.{name}", f"{theirs}attention.{part}", bias=True)
        yield from norm(f"{ours}mixer_norm", f"{theirs}attention.output.LayerNorm", bias=True)
        yield from linear(f"{ours}channel.up", f"{theirs}intermediate.dense", bias=True)
        yield from linear(f"{ours}channel.down", f"{theirs}output.dense", bias=True)
        yield from norm(f"{ours}channel_norm", f"{theirs}output.LayerNorm", bias=True)
    if model.pooler:
        yield from linear("pooler", f"{base}pooler.dense", bias=True)
    if model.head_transform:
        yield from linear("head_transform.linear", "cls.predictions.transform.dense", bias=True)
        yield from norm("head_transform.norm", "cls.predictions.transform.LayerNorm", bias=True)
        yield same("head_bias", "cls.predictions.bias")


FORMAT = Format(
    name="bert",
    config=config,
    to_config=to_config,
    entries=entries,
    tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    # The next-sentence head is not kept.
    buffers=(r"(bert\.)?embeddings\.position_ids", r"cls\.seq_relationship\..*", r"cls\.predictions\.decoder\.bias"),
)
