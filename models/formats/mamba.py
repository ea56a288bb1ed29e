"""Mamba-1 (Gu and Dao 2023) as transformers stores it."""

import math
from collections.abc import Iterator

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry, Flags, Format, depthwise, linear, norm, same, transposed
from phyla.models.mixers.mamba import MambaConfig


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width, expand = flags.take("hidden_size", 768), flags.take("expand", 2)
    flags.only("hidden_act", "silu")
    flags.only("rms_norm", True)
    flags.only("intermediate_size", int(expand * width))
    rank = flags.take("time_step_rank", "auto")
    mixer = MambaConfig(
        expand=int(expand * width) / width,
        state=flags.take("state_size", 16),
        conv=flags.take("conv_kernel", 4),
        dt_rank=math.ceil(width / 16) if rank == "auto" else rank,
        bias=flags.take("use_bias", False),
        conv_bias=flags.take("use_conv_bias", True),
    )
    model = ModelConfig(
        width=width,
        layers=flags.take("num_hidden_layers", 32),
        vocab_size=flags.take("vocab_size"),
        tie_embeddings=flags.take("tie_word_embeddings", True),
        norm_epsilon=flags.take("layer_norm_epsilon", 1e-5),
        pattern=(BlockConfig(mixer=mixer),),
    )
    flags.done(
        *("rescale_prenorm_residual", "residual_in_fp32", "use_associative_scan", "use_mambapy", "time_step_floor"),
        *("time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale"),
        # of the conversion from the authors' format, which say again what other flags say
        *("d_inner", "d_model", "fused_add_norm", "n_layer", "pad_vocab_size_multiple", "ssm_cfg"),
    )
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer = model.pattern[0].mixer
    if not isinstance(mixer, MambaConfig):
        raise UserError("the format mamba has Mamba-1 in every block; this model has not")
    expand, rest = divmod(mixer.inner(model), model.width)
    if rest:
        raise UserError(f"the format mamba can say whole values of expand only, not {mixer.expand}")
    return {
        "architectures": ["MambaForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "expand": expand,
        "intermediate_size": mixer.inner(model),
        "state_size": mixer.state,
        "conv_kernel": mixer.conv,
        "time_step_rank": mixer.rank(model),
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
    }


def mixer_entries(ours: str, theirs: str, mixer: MambaConfig) -> Iterator[Entry]:
    """Of one mixer."""
    yield from linear(f"{ours}.in_proj", f"{theirs}.in_proj", bias=mixer.bias)
    yield depthwise(f"{ours}.conv_weight", f"{theirs}.conv1d.weight")
    if mixer.conv_bias:
        yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")
    yield from linear(f"{ours}.x_proj", f"{theirs}.x_proj")
    yield transposed(f"{ours}.dt_proj.weight", f"{theirs}.dt_proj.weight")
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_proj.bias")
    yield same(f"{ours}.A_log", f"{theirs}.A_log")
    yield same(f"{ours}.D", f"{theirs}.D")
    yield from linear(f"{ours}.out_proj", f"{theirs}.out_proj", bias=mixer.bias)


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    yield same("embedding.weight", "backbone.embeddings.weight")
    for i, block in enumerate(model.blocks):
        assert isinstance(block.mixer, MambaConfig)
        yield from norm(f"blocks.{i}.mixer_norm", f"backbone.layers.{i}.norm")
        yield from mixer_entries(f"blocks.{i}.mixer", f"backbone.layers.{i}.mixer", block.mixer)
    yield from norm("norm", "backbone.norm_f")
    if not model.tie_embeddings:
        yield from linear("head", "lm_head")


FORMAT = Format(
    name="mamba",
    config=config,
    to_config=to_config,
    entries=entries,
    optional_prefix="backbone.",
    tied=("lm_head.weight", "backbone.embeddings.weight"),
)
