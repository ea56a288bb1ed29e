"""Every matrix, and every table of the vocabulary, becomes a `Quantized`: rounded to nearest, or by GPTQ."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.feedback import gptq
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import (
    Format,
    Int4,
    Int8,
    quantize_float8,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)
from phyla.kernels.quantized_matmul.formats import pack, spread
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized

FEWEST = 9
"""Inputs of a matrix that is worth it: a float32 scale takes as much room as eight codes of 4 bits."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Rule):
    """Rounds every matrix and every table of the vocabulary."""

    format: Literal["int8", "int4", "nf4", "float8"]
    group: int | None = None
    """Inputs that share a scale, for int4; None: all of an output channel. NF4's are 64."""
    gptq: bool = False
    """Not to nearest: what rounding one input costs is made good by the others. Heads and tables to nearest still."""

    def __post_init__(self):
        super().__post_init__()
        if self.gptq and self.format not in ("int8", "int4"):
            raise UserError(f"{self.method}: GPTQ is for int8 and int4; nearest: gptq-int4")
        if self.group is not None and self.format != "int4":
            raise UserError(f"{self.method}: only int4 has groups to choose; nearest: {self.format}")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise UserError(f"{self.method}: a group is an even number; nearest: int4-g{max(2, self.group + 1)}")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "gptq-" * self.gptq + self.format + (f"-g{self.group}" if self.group is not None else "")

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.gptq

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        return Applied(model, quantize(model, chosen, self, moments))


METHODS = {
    "int8": Method(
        "int8",
        lambda _, only: Quantize(format="int8", only=only),
        "codes of 8 bits, a scale for each output channel",
    ),
    "int4": Method(
        "int4",
        lambda _, only: Quantize(format="int4", only=only),
        "codes of 4 bits, a scale for each output channel",
    ),
    "int4-g64": Method(
        r"int4-g(\d+)",
        lambda found, only: Quantize(format="int4", group=int(found[1]), only=only),
        "codes of 4 bits, a scale for each 64 (or any even number of) inputs of an output channel",
    ),
    "nf4": Method(
        "nf4",
        lambda _, only: Quantize(format="nf4", only=only),
        "16 quantiles of the normal distribution in blocks of 64, whose scales have 8 bits (QLoRA)",
    ),
    "float8": Method(
        "float8",
        lambda _, only: Quantize(format="float8", only=only),
        "floats of 8 bits (e4m3), a scale for each output channel",
    ),
    "gptq-int8": Method(
        "gptq-int8",
        lambda _, only: Quantize(format="int8", gptq=True, only=only),
        "int8, one input after another: those that follow make each one's error good (reads text)",
    ),
    "gptq-int4": Method(
        "gptq-int4",
        lambda _, only: Quantize(format="int4", gptq=True, only=only),
        "the same with int4",
    ),
    "gptq-int4-g128": Method(
        r"gptq-int4-g(\d+)",
        lambda found, only: Quantize(format="int4", group=int(found[1]), gptq=True, only=only),
        "the same with a scale for each 128 (or any even number of) inputs of an output channel",
    ),
}
"""See `phyla.compression.recipes`."""


def quantize(model: LanguageModel, chosen: list[matrices.Place], recipe: Quantize, moments: Moments) -> dict[str, str]:
    """Rounds the chosen parameters, in place; returns those that it leaves, and why."""
    left = {}
    for place in chosen:
        turned = place.kind in ("table", "values")  # whose rows are the output channels
        dense, axes = place.value[...], place.axes
        if turned:
            dense, axes = dense.swapaxes(-1, -2), (*axes[:-2], axes[-1], axes[-2])
        if recipe.gptq and place.kind == "values":
            left[place.name] = "packed: no text tells of its values by themselves"
            continue
        if dense.shape[-2] < FEWEST:
            left[place.name] = f"of {dense.shape[-2]} inputs: its scales would take as much room as its codes"
            continue
        if recipe.gptq and place.kind == "matrix":
            held = round_with_feedback(dense, moments[place.path], recipe.format, recipe.group)
        else:
            held = round_to_nearest(dense, recipe.format, recipe.group)
        matrices.replace(model, place.path, Quantized(held, axes, transposed=turned))
    return left


@jax.jit(static_argnums=(1, 2))
def round_to_nearest(w: jax.Array, format: str, group: int | None) -> Format:
    """Every matrix [K, N] of w [..., K, N] by itself, one after another; see `Quantize`."""
    K = w.shape[-2]
    one = {
        "int8": quantize_int8,
        "int4": functools.partial(quantize_int4, group=group or K + K % 2),
        "nf4": quantize_nf4,
        "float8": quantize_float8,
    }[format]
    return each(one, w)


@jax.jit(static_argnums=(2, 3))
def round_with_feedback(w: jax.Array, moment: jax.Array, format: str, group: int | None) -> Format:
    """The scales of `round_to_nearest`, the codes of `gptq`, for each matrix [K, N] of w and its moments [K, K]."""

    def one(w: jax.Array, moment: jax.Array) -> Format:
        match held := round_to_nearest(w, format, group):
            case Int8():
                step = jnp.broadcast_to(held.scale, w.shape)
                return dataclasses.replace(held, codes=gptq(w, moment, step, -127, 127))
            case Int4():
                step = spread(held.scale, held.group, held.rows)
                return dataclasses.replace(held, codes=pack(gptq(w, moment, step, -8, 7)))
        raise AssertionError(format)

    return each(one, w, moment)
