"""How large a model is, and how wide it must be to have a given size; nothing is allocated."""

import dataclasses
import itertools
import math
from typing import Any

import jax
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel


def abstract(config: ModelConfig) -> LanguageModel:
    """The model with shapes in place of arrays. Raises UserError where the configuration contradicts itself."""
    return jax.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward operations per token of matrix products and mixers, at a context of `length` (no norms, no softmax).

    Of a mixture's experts those that a token uses count. A training step takes three times as many: Kaplan et al.
    2020, section 2.1.
    """
    uses = config.repeats // (config.groups or config.repeats)  # of parameters that repeats share
    parameters = nnx.to_flat_state(nnx.state(abstract(config)))
    matrices = sum(
        math.prod(p.shape) * p.get_metadata()["share"] * (uses if path[0] == "periods" else 1)
        for path, p in parameters
        if p.get_metadata()["matrix"]
    )
    if config.tie_embeddings:
        matrices += (config.vocab_size or 0) * (config.embedding_width or config.width)
    layers = [layer for block in config.blocks for layer in (block.mixer, block.channel) if layer is not None]
    return 2 * matrices + sum(layer.flops_per_token(config, length) for layer in layers)


def fit_width(config: ModelConfig, parameters: int, tolerance: float = 0.01) -> ModelConfig:
    """The configuration with the width that gives it the wanted number of parameters.

    Of the widths within the tolerance, the roundest (a multiple of 64, else 32, … else 1). Layers keep their other
    fields: those relative to the width, such as `expand`, follow it. Where heads must divide the width and leave none
    that is near enough, the nearest width is taken and `expand` of the channel mixers makes up the rest, by a factor
    between 2/3 and 3/2.

    Raises UserError if nothing comes near enough, or no width is valid.
    """

    def at(width: int) -> ModelConfig:
        return dataclasses.replace(config, width=width)

    def error(width: int) -> float:
        return count(at(width)) / parameters - 1

    # Heads may have to divide the width: then so does the narrowest valid width. The count grows with the width.
    narrowest = next(width for width in itertools.count(1) if _valid(at(width)))
    for multiple in (64, 32, 16, 8, 4, 2, 1):
        step = math.lcm(narrowest, multiple)
        low, high = 0, 1
        while error(high * step) < 0:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if error(middle * step) < 0 else (low, middle)
        best = min((n * step for n in (low, high) if n), key=lambda width: abs(error(width)))
        if abs(error(best)) <= tolerance:
            return at(best)
    low, high = 2 / 3, 3 / 2
    for _ in range(20):
        middle = math.sqrt(low * high)
        stretched = _stretched(at(best), middle)
        if abs(count(stretched) / parameters - 1) <= tolerance / 4:
            return stretched
        low, high = (middle, high) if count(stretched) < parameters else (low, middle)
    nearest = f"{count(at(best)):,} (width {best})"
    raise UserError(f"no model.width gives {parameters:,} parameters within {tolerance:.0%}; nearest: {nearest}")


def _stretched(config: ModelConfig, factor: float) -> ModelConfig:
    """With channel mixers `factor` times as wide inside."""

    def stretch(block: BlockConfig) -> BlockConfig:
        if not hasattr(block.channel, "expand"):
            return block
        channel: Any = block.channel
        return dataclasses.replace(block, channel=dataclasses.replace(channel, expand=factor * channel.expand))

    prefix, pattern = (tuple(map(stretch, blocks)) for blocks in (config.prefix, config.pattern))
    return dataclasses.replace(config, prefix=prefix, pattern=pattern)


def _valid(config: ModelConfig) -> bool:
    try:
        abstract(config)
    except UserError:
        return False
    return True
