"""RWKV-4 (Peng et al. 2023) as transformers stores it."""

from collections.abc import Iterator

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry, Flags, Format, linear, norm, reshaped, same
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    width = flags.take("hidden_size", 4096)
    inner, hidden = flags.take("attention_hidden_size", None), flags.take("intermediate_size", None)
    mixer = RWKV4Config(expand=1.0 if inner is None else inner / width)
    channel = RWKV4ChannelConfig(expand=4.0 if hidden is None else hidden / width)
    flags.only("layer_norm_epsilon", 1e-5)  # transformers' last norm has 1e-5 whatever the flag says
    model = ModelConfig(
        width=width,
        layers=flags.take("num_hidden_layers", 32),
        vocab_size=flags.take("vocab_size", 50277),
        tie_embeddings=flags.take("tie_word_embeddings", False),
        norm="layernorm",
        embedding_norm=True,
        pattern=(BlockConfig(mixer=mixer, channel=channel),),
    )
    # At inference transformers halves the residual stream and the matrices that add to it every so many layers, which
    # the norms undo. A state may be carried over a context of any length.
    flags.done("rescale_every", "context_length", "max_position_embeddings")
    return model


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mixer, channel = model.pattern[0].mixer, model.pattern[0].channel
    if not isinstance(mixer, RWKV4Config) or type(channel) is not RWKV4ChannelConfig:
        raise UserError("the format rwkv has RWKV-4's two mixers in every block; this model has not")
    return {
        "architectures": ["RwkvForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "attention_hidden_size": mixer.inner(model),
        "intermediate_size": channel.hidden(model),
        "layer_norm_epsilon": model.norm_epsilon,
        "rescale_every": 0,
        "tie_word_embeddings": model.tie_embeddings,
    }


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    D = model.width

    def mixes(ours: str, theirs: str, *names: str) -> Iterator[Entry]:
        for name in names:
            yield reshaped(f"{ours}.mix_{name[0]}", f"{theirs}.time_mix_{name}", (D,), (1, 1, D))

    yield same("embedding.weight", "rwkv.embeddings.weight")
    yield from norm("embedding_norm", "rwkv.blocks.0.pre_ln", bias=True)
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}", f"rwkv.blocks.{i}"
        yield from norm(f"{ours}.mixer_norm", f"{theirs}.ln1", bias=True)
        for name in ("time_decay", "time_first"):
            yield same(f"{ours}.mixer.{name}", f"{theirs}.attention.{name}")
        yield from mixes(f"{ours}.mixer", f"{theirs}.attention", "key", "value", "receptance")
        for name in ("key", "value", "receptance", "output"):
            yield from linear(f"{ours}.mixer.{name}", f"{theirs}.attention.{name}")
        yield from norm(f"{ours}.channel_norm", f"{theirs}.ln2", bias=True)
        yield from mixes(f"{ours}.channel", f"{theirs}.feed_forward", "key", "receptance")
        for name in ("key", "receptance", "value"):
            yield from linear(f"{ours}.channel.{name}", f"{theirs}.feed_forward.{name}")
    yield from norm("norm", "rwkv.ln_out", bias=True)
    if not model.tie_embeddings:
        yield from linear("head", "head")


FORMAT = Format(
    name="rwkv",
    config=config,
    to_config=to_config,
    entries=entries,
    optional_prefix="rwkv.",
    tied=("head.weight", "rwkv.embeddings.weight"),
)
