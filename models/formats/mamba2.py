"""Mamba-2 (Dao and Gu 2024) as transformers stores it."""

import math
from collections.abc import Iterator

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry, Flags, Format, depthwise, linear, norm, same
from phyla.models.mixers.mamba2 import Mamba2Config


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width, expand = flags.take("hidden_size", 4096), flags.take("expand", 2)
    head_dim, inner = flags.take("head_dim", 64), int(expand * width)
    flags.only("hidden_act", "silu")
    flags.only("rms_norm", True)
    flags.only("intermediate_size", inner)
    heads = flags.take("num_heads", 128)
    if heads * head_dim != inner:
        raise UserError(f"num_heads is {heads}; expand × hidden_size / head_dim = {inner / head_dim:g}")
    least, greatest = flags.take("time_step_limit", (0.0, math.inf))
    mixer = Mamba2Config(
        expand=inner / width,
        head_dim=head_dim,
        state=flags.take("state_size", 128),
        groups=flags.take("n_groups", 8),
        conv=flags.take("conv_kernel", 4),
        dt_limit=None if (least, greatest) == (0.0, math.inf) else (least, greatest),
        bias=flags.take("use_bias", False),
        conv_bias=flags.take("use_conv_bias", True),
    )
    model = ModelConfig(
        width=width,
        layers=flags.take("num_hidden_layers", 64),
        vocab_size=flags.take("vocab_size"),
        tie_embeddings=flags.take("tie_word_embeddings", False),
        norm_epsilon=flags.take("layer_norm_epsilon", 1e-5),
        pattern=(BlockConfig(mixer=mixer),),
    )
    flags.done(
        *("chunk_size", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme"),
        *("time_step_max", "time_step_min", "time_step_rank", "time_step_scale"),
        "norm_before_gate",  # some configurations have it; transformers gates first whatever it says
    )
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer = model.pattern[0].mixer
    if not isinstance(mixer, Mamba2Config):
        raise UserError("the format mamba2 has Mamba-2 in every block; this model has not")
    expand, rest = divmod(mixer.inner(model), model.width)
    if rest:
        raise UserError(f"the format mamba2 can say whole values of expand only, not {mixer.expand}")
    limit = {}
    if mixer.dt_limit is not None:
        limit["time_step_limit"] = [x if math.isfinite(x) else {"__float__": "Infinity"} for x in mixer.dt_limit]
    return limit | {
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "expand": expand,
        "head_dim": mixer.head_dim,
        "num_heads": mixer.heads(model),
        "state_size": mixer.state,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    yield same("embedding.weight", "backbone.embeddings.weight")
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        assert isinstance(mixer, Mamba2Config)
        ours, theirs = f"blocks.{i}.mixer", f"backbone.layers.{i}.mixer"
        yield from norm(f"blocks.{i}.mixer_norm", f"backbone.layers.{i}.norm")
        yield from linear(f"{ours}.in_proj", f"{theirs}.in_proj", bias=mixer.bias)
        yield depthwise(f"{ours}.conv_weight", f"{theirs}.conv1d.weight")
        if mixer.conv_bias:
            yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")
        for name in ("dt_bias", "A_log", "D"):
            yield same(f"{ours}.{name}", f"{theirs}.{name}")
        yield from norm(f"{ours}.norm", f"{theirs}.norm")
        yield from linear(f"{ours}.out_proj", f"{theirs}.out_proj", bias=mixer.bias)
    yield from norm("norm", "backbone.norm_f")
    if not model.tie_embeddings:
        yield from linear("head", "lm_head")


FORMAT = Format(
    name="mamba2",
    config=config,
    to_config=to_config,
    entries=entries,
    optional_prefix="backbone.",
    tied=("lm_head.weight", "backbone.embeddings.weight"),
)
