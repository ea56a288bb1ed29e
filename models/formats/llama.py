"""Llama (Touvron et al. 2023): RMSNorm, RoPE, grouped queries, a gated MLP. Shared by Mistral, GGUF and llama2.c."""

from collections.abc import Callable, Iterator
from typing import Any

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, inverse, linear, norm, same
from phyla.models.mixers.attention import AttentionConfig, RopeScaling
from phyla.models.mlp import GatedMLPConfig

NAMES = {
    "embedding": "model.embed_tokens",
    "mixer_norm": "model.layers.{}.input_layernorm",
    "mixer.q": "model.layers.{}.self_attn.q_proj",
    "mixer.k": "model.layers.{}.self_attn.k_proj",
    "mixer.v": "model.layers.{}.self_attn.v_proj",
    "mixer.o": "model.layers.{}.self_attn.o_proj",
    "channel_norm": "model.layers.{}.post_attention_layernorm",
    "channel.gate": "model.layers.{}.mlp.gate_proj",
    "channel.up": "model.layers.{}.mlp.up_proj",
    "channel.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def attention(flags: Flags, **fields: Any) -> AttentionConfig:
    """The attention of a Llama-like config.json."""
    heads = flags.take("num_attention_heads")
    base, scaling = rope(flags)
    return AttentionConfig(
        heads=heads,
        kv_heads=flags.take("num_key_value_heads", None) or heads,
        head_dim=flags.take("head_dim", None) or flags.take("hidden_size") // heads,
        rope_base=base,
        rope_scaling=scaling,
        **fields,
    )


def rope(flags: Flags) -> tuple[float, RopeScaling]:
    """Base and scaling, as transformers 5 writes them (`rope_parameters`) or as earlier versions do."""
    base = flags.take("rope_theta", 10_000.0)
    said = flags.take("rope_scaling", None)
    said = dict(flags.take("rope_parameters", None) or said or {})
    inner = Flags(said)
    base = inner.take("rope_theta", base)
    kind = inner.take("rope_type", inner.take("type", "default"))
    scaling = RopeScaling()
    if kind == "linear":
        scaling = RopeScaling(factor=inner.take("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            factor=inner.take("factor"),
            low_frequency=inner.take("low_freq_factor"),
            high_frequency=inner.take("high_freq_factor"),
            original_length=inner.take("original_max_position_embeddings"),
        )
    elif kind != "default":
        raise UserError(f"rope_type is {kind!r}; supported: 'default', 'linear', 'llama3'")
    inner.done()
    return float(base), scaling


def rope_flags(mixer: AttentionConfig) -> dict:
    """The inverse of `rope`, in both spellings."""
    scaling = mixer.rope_scaling
    said: dict[str, Any] = {"rope_type": "default"}
    if scaling.factor != 1:
        said = {"rope_type": "linear", "factor": scaling.factor}
        if scaling.original_length is not None:
            said |= {
                "rope_type": "llama3",
                "low_freq_factor": scaling.low_frequency,
                "high_freq_factor": scaling.high_frequency,
                "original_max_position_embeddings": scaling.original_length,
            }
    return {
        "rope_theta": mixer.rope_base,
        "rope_scaling": None if scaling.factor == 1 else said,
        "rope_parameters": {"rope_theta": mixer.rope_base, **said},
    }


def channel(flags: Flags, **fields: Any) -> GatedMLPConfig:
    """The gated MLP of a Llama-like config.json."""
    return GatedMLPConfig(
        expand=flags.take("intermediate_size") / flags.take("hidden_size"),
        activation=flags.choose("hidden_act", ACTIVATIONS, "silu"),
        **fields,
    )


def model(flags: Flags, block: BlockConfig) -> ModelConfig:
    """The model of a Llama-like config.json, of one kind of block; ends the reading of its flags."""
    found = ModelConfig(
        width=flags.take("hidden_size"),
        layers=flags.take("num_hidden_layers"),
        vocab_size=flags.take("vocab_size"),
        tie_embeddings=flags.take("tie_word_embeddings", False),
        norm_epsilon=flags.take("rms_norm_eps", 1e-6),
        pattern=(block,),
    )
    flags.done("attention_dropout", "max_position_embeddings")
    return found


def model_flags(model: ModelConfig, architecture: str) -> tuple[dict, AttentionConfig, Any]:
    """The flags that are the inverse of `attention`, `channel` and `model`; and the block's two layers.

    Raises UserError if the model has no attention and channel mixer of this family.
    """
    mixer, mlp = model.pattern[0].mixer, model.pattern[0].channel
    if not isinstance(mixer, AttentionConfig) or mlp is None or len(model.pattern) > 1:
        raise UserError(f"{architecture} has attention and a channel mixer in every block; this model has not")
    flags = {
        "architectures": [architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": mixer.resolved_head_dim(model),
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        **rope_flags(mixer),
    }
    return flags, mixer, mlp


def gated_flags(model: ModelConfig, mlp: Any) -> dict:
    """The inverse of `channel`. Raises UserError if it is no gated MLP."""
    if not isinstance(mlp, GatedMLPConfig):
        raise UserError("the format's channel mixer is a gated MLP; this model's is not")
    return {"intermediate_size": mlp.hidden(model), "hidden_act": inverse(ACTIVATIONS, mlp.activation)}


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    bias = flags.take("attention_bias", False)
    mixer = attention(flags, qkv_bias=bias, out_bias=bias)
    return model(flags, BlockConfig(mixer=mixer, channel=channel(flags, bias=flags.take("mlp_bias", False))))


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    flags, mixer, mlp = model_flags(model, "LlamaForCausalLM")
    return {**flags, **gated_flags(model, mlp), "attention_bias": mixer.qkv_bias, "mlp_bias": mlp.bias}


def attention_entries(
    model: ModelConfig, i: int, names: dict[str, str], rotated: Callable[..., list[Entry]] = linear
) -> Iterator[Entry]:
    """Norm and attention of block i; `rotated` reads the projections of queries and keys."""
    mixer: Any = model.blocks[i].mixer
    yield from norm(f"blocks.{i}.mixer_norm", names["mixer_norm"].format(i))
    for part, bias in (("q", mixer.qkv_bias), ("k", mixer.qkv_bias), ("v", mixer.qkv_bias), ("o", mixer.out_bias)):
        read = rotated if part in "qk" else linear
        yield from read(f"blocks.{i}.mixer.{part}", names[f"mixer.{part}"].format(i), bias=bias)


def whole_entries(
    model: ModelConfig, names: dict[str, str], block: Callable[[int], Iterator[Entry]]
) -> Iterator[Entry]:
    """Embedding, blocks, norm and head."""
    yield same("embedding.weight", f"{names['embedding']}.weight")
    for i in range(model.layers):
        yield from block(i)
    yield from norm("norm", names["norm"])
    if not model.tie_embeddings:
        yield from linear("head", names["head"])


def entries(
    model: ModelConfig, names: dict[str, str] = NAMES, rotated: Callable[..., list[Entry]] = linear
) -> Iterator[Entry]:
    """See `Format.entries`."""

    def block(i: int) -> Iterator[Entry]:
        mlp: Any = model.blocks[i].channel
        yield from attention_entries(model, i, names, rotated)
        yield from norm(f"blocks.{i}.channel_norm", names["channel_norm"].format(i))
        for part in ("gate", "up", "down"):
            yield from linear(f"blocks.{i}.channel.{part}", names[f"channel.{part}"].format(i), bias=mlp.bias)

    return whole_entries(model, names, block)


BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
TIED = ("lm_head.weight", "model.embed_tokens.weight")
FORMAT = Format("llama", config, to_config, entries, "model.", TIED, BUFFERS)
