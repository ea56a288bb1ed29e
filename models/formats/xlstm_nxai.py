"""The first xLSTM (Beck et al. 2024) as the authors' package `xlstm` stores it: `xLSTMLMModel`, "vanilla" sLSTM.

Norms hold what their scale exceeds 1 by, in more digits than float32 has for the scale itself: what is written can
differ by one part in 2^24 from what was read, and gives the same scales. The sLSTM layer of the package names its
projections to the input and forget gates the other way round.
"""

from collections.abc import Iterator

import numpy as np

from phyla.models.config import Activation, BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.table import Entry, Flags, Format, depthwise, fused, inverse, linear, reshaped, same
from phyla.models.mixers.mlstm import MLSTMBlockConfig
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.mlp import GatedMLPConfig

ROUND_TO = 64  # the package rounds the inner widths up to it
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "relu": "relu", "relu^2": "relu_squared", "swish": "silu"}


def config(raw: dict) -> ModelConfig:
    """See `Format.config`."""
    flags = Flags(raw)
    layers, heads = flags.take("num_blocks"), flags.take("num_heads", 4)
    at = flags.take("slstm_at", [])
    at = set(range(layers)) if at == "all" else set(at)
    if beyond := sorted(i for i in at if not 0 <= i < layers):
        raise UserError(f"slstm_at has block {beyond[0]}, but num_blocks is {layers}")
    conv = flags.take("conv1d_kernel_size", 4)
    mlstm = MLSTMBlockConfig(
        heads=heads,
        expand=flags.take("mlstm_proj_factor", 2.0),
        round_to=ROUND_TO,
        conv=conv,
        projection=flags.take("qkv_proj_blocksize", 4),
        bias=flags.take("bias", False),
    )
    channel = GatedMLPConfig(
        expand=flags.take("slstm_ffn_proj_factor", 1.3),
        round_to=ROUND_TO,
        activation=flags.choose("slstm_ffn_act", ACTIVATIONS, "gelu"),
    )
    flags.only("norm", "LayerNorm")
    kinds = BlockConfig(mixer=mlstm), BlockConfig(mixer=SLSTMConfig(heads=heads, conv=conv), channel=channel)
    model = ModelConfig(
        width=flags.take("embedding_dim"),
        layers=layers,
        vocab_size=flags.take("vocab_size"),
        tie_embeddings=flags.take("tie_weights", False),
        norm="layernorm",
        norm_bias=False,
        final_norm=flags.take("add_post_blocks_norm", True),
        pattern=_period([kinds[i in at] for i in range(layers)]),
    )
    # of training, and a bound that nothing but a mask in the package depends on
    flags.done("add_embedding_dropout", "context_length", "dropout", "weight_decay_on_embedding")
    return model


def _period(blocks: list[BlockConfig]) -> tuple[BlockConfig, ...]:
    """The shortest pattern that repeats to give these."""
    lengths = (n for n in range(1, len(blocks) + 1) if len(blocks) % n == 0)
    return next(tuple(blocks[:n]) for n in lengths if blocks[:n] * (len(blocks) // n) == blocks)


def to_config(model: ModelConfig) -> dict:
    """See `Format.to_config`."""
    mlstm = {block.mixer for block in model.blocks if isinstance(block.mixer, MLSTMBlockConfig)}
    slstm = {block for block in model.blocks if isinstance(block.mixer, SLSTMConfig)}
    if len(mlstm) > 1 or len(slstm) > 1 or {block.mixer for block in model.blocks} != mlstm | {b.mixer for b in slstm}:
        raise UserError("the format xlstm-original has one kind of mLSTM block and one of sLSTM; this model has others")
    raw = {
        "vocab_size": model.vocab_size,
        "embedding_dim": model.width,
        "num_blocks": model.layers,
        "slstm_at": [i for i, block in enumerate(model.blocks) if block in slstm],
        "tie_weights": model.tie_embeddings,
        "add_post_blocks_norm": model.final_norm,
    }
    for block in slstm:
        assert isinstance(block.mixer, SLSTMConfig)
        if not isinstance(block.channel, GatedMLPConfig):
            raise UserError("the format xlstm-original has a gated MLP after every sLSTM; this model has not")
        raw |= {
            "num_heads": block.mixer.heads,
            "conv1d_kernel_size": block.mixer.conv,
            "slstm_ffn_proj_factor": block.channel.expand,
            "slstm_ffn_act": inverse(ACTIVATIONS, block.channel.activation),
        }
    for mixer in mlstm:
        raw |= {
            "num_heads": mixer.heads,
            "conv1d_kernel_size": mixer.conv,
            "qkv_proj_blocksize": mixer.projection,
            "mlstm_proj_factor": mixer.expand,
            "bias": mixer.bias,
        }
    return raw


def entries(model: ModelConfig) -> Iterator[Entry]:
    """See `Format.entries`."""
    yield same("embedding.weight", "token_embedding.weight")
    for i, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{i}", f"xlstm_block_stack.blocks.{i}"
        yield _norm(f"{ours}.mixer_norm", f"{theirs}.xlstm_norm")
        if isinstance(block.mixer, MLSTMBlockConfig):
            yield from _mlstm(f"{ours}.mixer", f"{theirs}.xlstm", block.mixer)
            continue
        assert isinstance(block.mixer, SLSTMConfig)
        assert isinstance(block.channel, GatedMLPConfig)
        yield from _slstm(f"{ours}.mixer", f"{theirs}.xlstm", block.mixer, model.width)
        yield _norm(f"{ours}.channel_norm", f"{theirs}.ffn_norm")
        gate_and_up = [f"{ours}.channel.{name}.weight" for name in ("gate", "up")]
        yield fused(gate_and_up, f"{theirs}.ffn.proj_up.weight", [block.channel.hidden(model)] * 2)
        yield from linear(f"{ours}.channel.down", f"{theirs}.ffn.proj_down")
    if model.final_norm:
        yield _norm("norm", "xlstm_block_stack.post_blocks_norm")
    if not model.tie_embeddings:
        yield from linear("head", "lm_head")


def _mlstm(ours: str, theirs: str, mixer: MLSTMBlockConfig) -> Iterator[Entry]:
    yield from linear(f"{ours}.up", f"{theirs}.proj_up", bias=mixer.bias)
    yield depthwise(f"{ours}.conv_weight", f"{theirs}.conv1d.conv.weight")
    yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.conv.bias")
    for name in "qkv":
        yield _headwise(f"{ours}.{name}.weight", f"{theirs}.{name}_proj.weight")
        if mixer.bias:
            yield same(f"{ours}.{name}.bias", f"{theirs}.{name}_proj.bias")
    for name in "if":
        yield from linear(f"{ours}.{name}_gate", f"{theirs}.mlstm_cell.{name}gate")
        yield same(f"{ours}.{name}_bias", f"{theirs}.mlstm_cell.{name}gate.bias")
    yield _norm(f"{ours}.norm", f"{theirs}.mlstm_cell.outnorm")
    yield same(f"{ours}.skip", f"{theirs}.learnable_skip")
    yield from linear(f"{ours}.down", f"{theirs}.proj_down", bias=mixer.bias)


def _slstm(ours: str, theirs: str, mixer: SLSTMConfig, width: int) -> Iterator[Entry]:
    H, P = mixer.heads, width // mixer.heads
    if mixer.conv:
        yield depthwise(f"{ours}.conv_weight", f"{theirs}.conv1d.conv.weight")
        yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.conv.bias")
    for name, gate in zip("ifzo", "fizo", strict=True):
        yield _headwise(f"{ours}.{name}.weight", f"{theirs}.{gate}gate.weight")
    yield Entry(
        (f"{ours}.recurrent",),
        (f"{theirs}.slstm_cell._recurrent_kernel_",),  # (heads, gates × out, in); ours (gates, heads, in, out)
        lambda x: (x.reshape(H, 4, P, P).transpose(1, 0, 3, 2),),
        lambda x: (x.transpose(1, 0, 3, 2).reshape(H, 4 * P, P),),
    )
    yield reshaped(f"{ours}.bias", f"{theirs}.slstm_cell._bias_", (4, H, P), (4 * H * P,))
    yield _norm(f"{ours}.norm", f"{theirs}.group_norm")


def _norm(ours: str, theirs: str) -> Entry:
    one = np.float32(1)
    return Entry((f"{ours}.scale",), (f"{theirs}.weight",), lambda x: (x + one,), lambda x: (x - one,))


def _headwise(ours: str, theirs: str) -> Entry:
    """Blocks: ours (in, out), theirs (out, in)."""
    return Entry((ours,), (theirs,), lambda x: (x.swapaxes(1, 2),), lambda x: (x.swapaxes(1, 2),))


FORMAT = Format(
    name="xlstm-original",
    config=config,
    to_config=to_config,
    entries=entries,
    tied=("lm_head.weight", "token_embedding.weight"),
)
