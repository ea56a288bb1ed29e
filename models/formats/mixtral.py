"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in every block."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.formats import llama
from phyla.models.formats.table import ACTIVATIONS, Entry, Flags, Format, inverse, norm, transposed
from phyla.models.moe import MoEConfig

DEFAULTS = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8}
"""Of transformers' configuration, where they are not Llama's."""
EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(DEFAULTS | raw)
    mixer = llama.attention(flags, window=flags.take("sliding_window", None))
    channel = MoEConfig(
        experts=flags.take("num_local_experts", 8),
        top_k=flags.take("num_experts_per_tok", 2),
        expand=flags.take("intermediate_size") / flags.take("hidden_size"),
        activation=flags.choose("hidden_act", ACTIVATIONS, "silu"),
        balance_loss=flags.take("router_aux_loss_coef", 0.001),
        z_loss=0.0,
    )
    flags.take("output_router_logits", False)  # of training only, as the noise is
    flags.take("router_jitter_noise", 0.0)
    return llama.model(flags, BlockConfig(mixer=mixer, channel=channel))


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`. What is read back and differs is found there."""
    flags, mixer, channel = llama.model_flags(model, "MixtralForCausalLM")
    return {
        **flags,
        "sliding_window": mixer.window,
        "num_local_experts": channel.experts,
        "num_experts_per_tok": channel.top_k,
        "intermediate_size": channel.hidden(model),
        "hidden_act": inverse(ACTIVATIONS, channel.activation),
        "router_aux_loss_coef": channel.balance_loss,
    }


def experts(ours: str, theirs: str, count: int) -> Entry:
    """An `ExpertLinear`: ours [E, in, out], theirs (out, in) for each expert, with a name that has its number."""
    return Entry(
        (ours,),
        tuple(theirs.format(expert) for expert in range(count)),
        lambda *each: (np.stack([x.T for x in each]),),
        lambda x: tuple(x[expert].T for expert in range(count)),
    )


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""

    def block(i: int) -> Iterator[Entry]:
        channel: Any = model.blocks[i].channel
        yield from llama.attention_entries(model, i, llama.NAMES)
        yield from norm(f"blocks.{i}.channel_norm", llama.NAMES["channel_norm"].format(i))
        theirs = f"model.layers.{i}.block_sparse_moe"
        yield transposed(f"blocks.{i}.channel.router.weight", f"{theirs}.gate.weight")
        for part, name in EXPERT.items():
            yield experts(f"blocks.{i}.channel.{part}.weight", f"{theirs}.experts.{{}}.{name}.weight", channel.experts)

    return llama.whole_entries(model, llama.NAMES, block)


FORMAT = Format("mixtral", config, to_config, entries, "model.", llama.TIED, llama.BUFFERS)
