"""xLSTM-7B (Beck et al. 2025) as transformers stores it: mLSTM and a gated MLP in every block."""

import math
from collections.abc import Iterator

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry, Flags, Format, linear, norm, same
from phyla.models.mixers.mlstm import MLSTMConfig
from phyla.models.mlp import GatedMLPConfig


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width = _either(flags, "hidden_size", "embedding_dim", 4096)
    channel = _channel(width, flags.take("ffn_proj_factor", 2.667), flags.take("ffn_round_up_to_multiple_of", 64))
    flags.only("weight_mode", "single")  # "fused" holds the same matrices in fewer tensors
    flags.only("use_bias", False)
    kernel = flags.take("chunkwise_kernel", "chunkwise--native_autograd")
    if "siging" in kernel:
        raise UserError(f"chunkwise_kernel is {kernel!r}; supported: those with the exponential input gate")
    mixer = MLSTMConfig(
        heads=flags.take("num_heads", 8),
        qk_expand=int(width * flags.take("qk_dim_factor", 0.5)) / width,
        v_expand=int(width * flags.take("v_dim_factor", 1.0)) / width,
        gate_cap=flags.take("gate_soft_cap", 15.0),
        epsilon=flags.take("eps", 1e-6),
    )
    model = ModelConfig(
        width=width,
        layers=_either(flags, "num_hidden_layers", "num_blocks", 32),
        vocab_size=flags.take("vocab_size", 50304),
        tie_embeddings=flags.take("tie_word_embeddings", False),
        logit_cap=flags.take("output_logit_soft_cap", 30.0),
        final_norm=flags.take("add_out_norm", True),
        norm_epsilon=flags.take("norm_eps", 1e-6),
        pattern=(BlockConfig(mixer=mixer, channel=channel),),
    )
    flags.done(  # how their kernels compute
        *("autocast_kernel_dtype", "chunk_size", "inference_state_dtype", "max_inference_chunksize", "mode"),
        *("norm_reduction_force_float32", "return_last_states", "sequence_kernel", "step_kernel"),
    )
    return model


def _channel(width: int, factor: float, multiple: int) -> GatedMLPConfig:
    """Their hidden width: a fraction that is all that goes beyond a multiple is dropped, not rounded up."""
    hidden = int((width * factor + multiple - 1) // multiple * multiple)
    if multiple > 1 and hidden == math.ceil(width * factor / multiple) * multiple:
        return GatedMLPConfig(expand=factor, round_to=multiple)
    return GatedMLPConfig(expand=hidden / width)


def _either(flags: Flags, name: str, other: str, default: int) -> int:
    """A number with two names, each of which may be absent or null."""
    said = {value for key in (name, other) if (value := flags.take(key, None)) is not None}
    if len(said) > 1:
        raise UserError(f"{name} is {flags.raw[name]}, but {other} is {flags.raw[other]}")
    return said.pop() if said else default


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer, channel = model.pattern[0].mixer, model.pattern[0].channel
    if not isinstance(mixer, MLSTMConfig) or not isinstance(channel, GatedMLPConfig):
        raise UserError("the format xlstm has mLSTM and a gated MLP in every block; this model has not")
    return {
        "architectures": ["xLSTMForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "embedding_dim": model.width,
        "num_hidden_layers": model.layers,
        "num_blocks": model.layers,
        "num_heads": mixer.heads,
        "qk_dim_factor": _factor(mixer.qk_width(model), model.width),
        "v_dim_factor": _factor(mixer.v_width(model), model.width),
        "ffn_proj_factor": _factor(channel.hidden(model), model.width),
        "ffn_round_up_to_multiple_of": channel.round_to,
        "gate_soft_cap": mixer.gate_cap,
        "output_logit_soft_cap": model.logit_cap,
        "eps": mixer.epsilon,
        "norm_eps": model.norm_epsilon,
        "add_out_norm": model.final_norm,
        "tie_word_embeddings": model.tie_embeddings,
        "use_bias": False,
        "weight_mode": "single",
    }


def _factor(size: int, width: int) -> float:
    """Their factor of the width, of which the product is rounded down."""
    factor = size / width
    return factor if int(width * factor) == size else math.nextafter(factor, math.inf)


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    yield same("embedding.weight", "backbone.embeddings.weight")
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"backbone.blocks.{i}"
        yield from norm(f"{ours}.mixer_norm", f"{theirs}.norm_mlstm")
        for name in "qkv":
            yield from linear(f"{ours}.mixer.{name}", f"{theirs}.mlstm_layer.{name}")
        yield from linear(f"{ours}.mixer.o_gate", f"{theirs}.mlstm_layer.ogate_preact")
        for name in "if":
            yield from linear(f"{ours}.mixer.{name}_gate", f"{theirs}.mlstm_layer.{name}gate_preact")
            yield same(f"{ours}.mixer.{name}_bias", f"{theirs}.mlstm_layer.{name}gate_preact.bias")
        yield from norm(f"{ours}.mixer.norm", f"{theirs}.mlstm_layer.multihead_norm")
        yield from linear(f"{ours}.mixer.out", f"{theirs}.mlstm_layer.out_proj")
        yield from norm(f"{ours}.channel_norm", f"{theirs}.norm_ffn")
        yield from linear(f"{ours}.channel.gate", f"{theirs}.ffn.proj_up_gate")
        yield from linear(f"{ours}.channel.up", f"{theirs}.ffn.proj_up")
        yield from linear(f"{ours}.channel.down", f"{theirs}.ffn.proj_down")
    if model.final_norm:
        yield from norm("norm", "backbone.out_norm")
    if not model.tie_embeddings:
        yield from linear("head", "lm_head")


FORMAT = Format(
    name="xlstm",
    config=config,
    to_config=to_config,
    entries=entries,
    optional_prefix="backbone.",
    tied=("lm_head.weight", "backbone.embeddings.weight"),
)
