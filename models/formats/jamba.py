"""Jamba (Lieber et al. 2024): Mamba with normed dt, B and C, attention without positions, experts in some blocks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats import llama, mamba
from phyla.models.formats.mixtral import experts
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, inverse, linear, norm, transposed
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.models.moe import MoEConfig

NAMES = llama.NAMES | {"channel_norm": "model.layers.{}.pre_ff_layernorm", "norm": "model.final_layernorm"}


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width, layers = flags.take("hidden_size"), flags.take("num_hidden_layers")
    heads = flags.take("num_attention_heads")
    rank = flags.take("mamba_dt_rank", "auto")
    attention = AttentionConfig(
        heads=heads,
        kv_heads=flags.take("num_key_value_heads", None) or heads,
        head_dim=width // heads,
        positions="none",
        window=flags.take("sliding_window", None),
    )
    scan = MambaConfig(
        expand=float(flags.take("mamba_expand", 2)),
        state=flags.take("mamba_d_state", 16),
        conv=flags.take("mamba_d_conv", 4),
        dt_rank=math.ceil(width / 16) if rank == "auto" else rank,
        bias=flags.take("mamba_proj_bias", False),
        conv_bias=flags.take("mamba_conv_bias", True),
        norms=True,
    )
    dense = GatedMLPConfig(
        expand=flags.take("intermediate_size") / width,
        activation=flags.choose("hidden_act", ACTIVATIONS, "silu"),
    )
    mixture = MoEConfig(
        experts=flags.take("num_experts", 16),
        top_k=flags.take("num_experts_per_tok", 2),
        expand=dense.expand,
        activation=dense.activation,
        weights="softmax_of_all",
        balance_loss=flags.take("router_aux_loss_coef", 0.001),
        z_loss=0.0,
    )
    attends = flags.take("attn_layer_period", 8), flags.take("attn_layer_offset", 4)
    routes = flags.take("expert_layer_period", 2), flags.take("expert_layer_offset", 1)

    def block(i: int) -> BlockConfig:
        mixer = attention if i % attends[0] == attends[1] else scan
        routed = i % routes[0] == routes[1] and mixture.experts > 1  # of one expert, an MLP is made
        return BlockConfig(mixer=mixer, channel=mixture if routed else dense)

    model = ModelConfig(
        width=width,
        layers=layers,
        vocab_size=flags.take("vocab_size"),
        tie_embeddings=flags.take("tie_word_embeddings", False),
        norm_epsilon=flags.take("rms_norm_eps", 1e-6),
        pattern=shortest_period([block(i) for i in range(layers)]),
    )
    flags.done(
        *("attention_dropout", "calc_logits_for_entire_prompt", "max_position_embeddings", "num_logits_to_keep"),
        *("output_router_logits", "use_associative_scan", "use_mamba_kernels", "use_mambapy"),
    )
    return model


def shortest_period(blocks: Sequence[BlockConfig]) -> tuple[BlockConfig, ...]:
    """The least blocks that, repeated, are all of them."""
    n = len(blocks)
    periods = (p for p in range(1, n + 1) if n % p == 0 and all(blocks[i] == blocks[i % p] for i in range(n)))
    return tuple(blocks[: next(periods)])


def period_and_offset(model: ModelConfig, holds: Callable[[BlockConfig], bool], what: str) -> tuple[int, int]:
    """Which blocks `holds` is true of, as a period and an offset: of the pattern's period if that can say it.

    Raises UserError if none can.
    """
    found, pattern = [holds(block) for block in model.blocks], len(model.pattern)
    periods = sorted(range(1, model.layers + 2), key=lambda period: (pattern % period != 0, period))
    for period in periods:
        for offset in range(period):
            if found == [i % period == offset for i in range(model.layers)]:
                return period, offset
    raise UserError(f"the format jamba has {what} at every so many blocks; this model has not")


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`. What is read back and differs is found there."""
    layers = [layer for block in model.blocks for layer in (block.mixer, block.channel)]

    def first(kind: Callable[..., Any], default: Any) -> Any:
        return next((layer for layer in layers if type(layer) is kind), default)

    attention, scan = first(AttentionConfig, AttentionConfig(positions="none")), first(MambaConfig, MambaConfig())
    mixture = first(MoEConfig, MoEConfig(experts=1, top_k=1))
    dense = first(GatedMLPConfig, mixture)
    attends = period_and_offset(model, lambda block: isinstance(block.mixer, AttentionConfig), "attention")
    routes = period_and_offset(model, lambda block: isinstance(block.channel, MoEConfig), "experts")
    return {
        "architectures": ["JambaForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "sliding_window": attention.window,
        "mamba_expand": scan.expand if scan.expand % 1 else int(scan.expand),
        "mamba_d_state": scan.state,
        "mamba_d_conv": scan.conv,
        "mamba_dt_rank": scan.rank(model),
        "mamba_proj_bias": scan.bias,
        "mamba_conv_bias": scan.conv_bias,
        "intermediate_size": dense.hidden(model),
        "hidden_act": inverse(ACTIVATIONS, dense.activation),
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "router_aux_loss_coef": mixture.balance_loss,
        "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1],
        "expert_layer_period": routes[0],
        "expert_layer_offset": routes[1],
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""

    def block(i: int) -> Iterator[Entry]:
        config, ours, theirs = model.blocks[i], f"blocks.{i}", f"model.layers.{i}"
        if isinstance(config.mixer, MambaConfig):
            yield from norm(f"{ours}.mixer_norm", NAMES["mixer_norm"].format(i))
            yield from mamba.mixer_entries(f"{ours}.mixer", f"{theirs}.mamba", config.mixer)
            for part in ("dt", "B", "C"):
                yield from norm(f"{ours}.mixer.{part}_norm", f"{theirs}.mamba.{part.lower()}_layernorm")
        else:
            yield from llama.attention_entries(model, i, NAMES)
        yield from norm(f"{ours}.channel_norm", NAMES["channel_norm"].format(i))
        channel: Any = config.channel
        if isinstance(channel, MoEConfig):
            yield transposed(f"{ours}.channel.router.weight", f"{theirs}.feed_forward.router.weight")
        for part in ("gate", "up", "down"):
            if isinstance(channel, MoEConfig):
                name = f"{theirs}.feed_forward.experts.{{}}.{part}_proj.weight"
                yield experts(f"{ours}.channel.{part}.weight", name, channel.experts)
            else:
                yield from linear(f"{ours}.channel.{part}", f"{theirs}.feed_forward.{part}_proj")

    return llama.whole_entries(model, NAMES, block)


FORMAT = Format("jamba", config, to_config, entries, "model.", llama.TIED)
