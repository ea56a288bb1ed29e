"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, matrices stored (in, out), q, k and v in one."""

from collections.abc import Iterator
from typing import Any

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, fused, inverse, linear, norm, same
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width = flags.take("n_embd", 768)
    flags.only("scale_attn_weights", True)
    flags.only("scale_attn_by_inverse_layer_idx", False)
    flags.only("add_cross_attention", False)
    mixer = AttentionConfig(heads=flags.take("n_head", 12), positions="none", qkv_bias=True, out_bias=True)
    channel = MLPConfig(
        expand=(flags.take("n_inner", None) or 4 * width) / width,
        activation=flags.choose("activation_function", ACTIVATIONS, "gelu_new"),
        bias=True,
    )
    model = ModelConfig(
        width=width,
        layers=flags.take("n_layer", 12),
        vocab_size=flags.take("vocab_size", 50257),
        learned_positions=flags.take("n_positions", 1024),
        tie_embeddings=flags.take("tie_word_embeddings", True),
        norm="layernorm",
        norm_epsilon=flags.take("layer_norm_epsilon", 1e-5),
        pattern=(BlockConfig(mixer=mixer, channel=channel),),
    )
    flags.done(
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation"),
        *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    )
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer, channel = model.pattern[0].mixer, model.pattern[0].channel
    if not isinstance(mixer, AttentionConfig) or not isinstance(channel, MLPConfig):
        raise UserError("GPT-2 has attention and an MLP in every block; this model has not")
    if isinstance(channel, GatedMLPConfig):
        raise UserError("GPT-2 has no gated MLP; this model's is gated")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab_size,
        "n_positions": model.learned_positions,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": mixer.heads,
        "n_inner": channel.hidden(model),
        "activation_function": inverse(ACTIVATIONS, channel.activation),
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    stored: dict[str, Any] = {"bias": True, "transpose": False}
    yield same("embedding.weight", "transformer.wte.weight")
    yield same("position_embedding.weight", "transformer.wpe.weight")
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        yield from norm(f"{ours}.mixer_norm", f"{theirs}.ln_1", bias=True)
        for part in ("weight", "bias"):
            qkv = [f"{ours}.mixer.{name}.{part}" for name in "qkv"]
            yield fused(qkv, f"{theirs}.attn.c_attn.{part}", [model.width] * 3, transpose=False)
        yield from linear(f"{ours}.mixer.o", f"{theirs}.attn.c_proj", **stored)
        yield from norm(f"{ours}.channel_norm", f"{theirs}.ln_2", bias=True)
        yield from linear(f"{ours}.channel.up", f"{theirs}.mlp.c_fc", **stored)
        yield from linear(f"{ours}.channel.down", f"{theirs}.mlp.c_proj", **stored)
    yield from norm("norm", "transformer.ln_f", bias=True)
    if not model.tie_embeddings:
        yield from linear("head", "lm_head")


FORMAT = Format(
    name="gpt2",
    config=config,
    to_config=to_config,
    entries=entries,
    optional_prefix="transformer.",
    tied=("lm_head.weight", "transformer.wte.weight"),
    buffers=(r"transformer\.h\.\d+\.attn\.(masked_)?bias", r"h\.\d+\.attn\.(masked_)?bias"),
)
