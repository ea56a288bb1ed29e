"""Mistral (Jiang et al. 2023): Llama without biases, with a sliding window."""

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.formats import llama
from phyla.models.formats.table import Flags, Format


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    mixer = llama.attention(flags, window=flags.take("sliding_window", 4096))
    return llama.model(flags, BlockConfig(mixer=mixer, channel=llama.channel(flags)))


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    flags, mixer, mlp = llama.model_flags(model, "MistralForCausalLM")
    return {**flags, **llama.gated_flags(model, mlp), "sliding_window": mixer.window}


FORMAT = Format("mistral", config, to_config, llama.entries, "model.", llama.TIED, llama.BUFFERS)
