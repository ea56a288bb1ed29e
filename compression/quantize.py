"""Every matrix, and every table of the vocabulary, becomes a `Quantized`: rounded to nearest, or by GPTQ."""

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.feedback import gptq
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import (
    Codes,
    Format,
    Int8,
    quantize_codes,
    quantize_float8,
    quantize_ggml,
    quantize_int8,
    quantize_nf4,
    quantize_ternary,
)
from phyla.kernels.quantized_matmul.ggml import KINDS, fitting
from phyla.kernels.quantized_matmul.packing import pack, unit
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized

FEWEST = 9
"""Inputs of a matrix that is worth it: a float32 scale takes as much room as eight codes of 4 bits."""


Whole = Literal["int8", "int4", "int3", "int2"]
Blocks = Literal["q8_0", "q6_k", "q5_0", "q4_k", "q4_1", "q4_0", "q2_k"]
"""Of a GGUF file."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Rule):
    """Rounds every matrix and every table of the vocabulary."""

    format: Whole | Literal["nf4", "float8", "ternary"] | Blocks
    group: int | None = None
    """Inputs that share a scale, for integers; None: all of an output channel. Other formats have their own blocks."""
    tensor: bool = False
    """One scale for the whole matrix."""
    asymmetric: bool = False
    """Integers from the least to the greatest value, with a zero point (min-max)."""
    mse: bool = False
    """Integers of the part of the range that has the least squared error; what lies outside is clipped."""
    gptq: bool = False
    """Not to nearest: what rounding one input costs is made good by the others. Heads and tables to nearest still."""

    def __post_init__(self):
        super().__post_init__()
        integer = self.format.startswith("int")
        if self.gptq and not integer:
            raise UserError(f"{self.method}: GPTQ is for integers; nearest: gptq-int4")
        if self.group is not None and not integer:
            raise UserError(f"{self.method}: only integers have groups to choose; nearest: {self.format}")
        if (self.asymmetric or self.mse) and not integer:
            raise UserError(f"{self.method}: only the range of integers is chosen; nearest: {self.format}")
        if self.tensor and (self.group is not None or not (integer or self.format == "float8")):
            raise UserError(f"{self.method}: a scale is shared by a group or by the matrix; nearest: int8-tensor")
        if self.group is not None:
            rows = max(2, unit(self.bits))
            if self.group < rows or self.group % rows:
                nearest = f"{self.format}-g{max(1, -(-self.group // rows)) * rows}"
                raise UserError(f"{self.method}: a group is a multiple of {rows}; nearest: {nearest}")

    @property
    def bits(self) -> int:
        """Of an integer's code."""
        return int(self.format.removeprefix("int"))

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        scales = "-tensor" if self.tensor else f"-g{self.group}" if self.group is not None else ""
        return "gptq-" * self.gptq + self.format + scales + "-asym" * self.asymmetric + "-mse" * self.mse

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.gptq

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        return Applied(model, quantize(model, chosen, self, moments))


def _named(found: re.Match, only: str) -> Quantize:
    parts = re.fullmatch(r"(gptq-)?(ternary|[a-z]+\d\w*)(-tensor)?(?:-g(\d+))?(-asym)?(-mse)?", found[0])
    assert parts is not None
    gptq, format_, tensor, group, asymmetric, mse = parts.groups()
    named: Any = format_
    return Quantize(
        format=named,
        group=None if group is None else int(group),
        tensor=tensor is not None,
        asymmetric=asymmetric is not None,
        mse=mse is not None,
        gptq=gptq is not None,
        only=only,
    )


INTEGER, SCALES = "int[2348]", r"(?:-tensor|-g\d+)?"
METHODS = {
    name: Method(pattern, _named, summary)
    for name, pattern, summary in (
        ("int8", INTEGER, "codes of 8 (or 4, 3, 2) bits, a scale for each output channel"),
        ("int4-g64", INTEGER + r"-g\d+", "a scale for each 64 (or any even number of) inputs of an output channel"),
        ("int8-tensor", f"(?:{INTEGER}|float8)-tensor", "one scale for the whole matrix (also float8-tensor)"),
        ("int4-g64-asym", INTEGER + SCALES + "-asym", "from the least to the greatest value, with a zero point"),
        ("int4-g64-mse", INTEGER + SCALES + "(?:-asym)?-mse", "a range clipped for the least squared error"),
        ("nf4", "nf4", "16 quantiles of the normal distribution in blocks of 64, whose scales have 8 bits (QLoRA)"),
        ("ternary", "ternary", "-1, 0 and 1 times the mean magnitude of the matrix (BitNet b1.58), codes of 2 bits"),
        ("float8", "float8", "floats of 8 bits (e4m3), a scale for each output channel"),
        (
            "gptq-int4-g128",
            f"gptq-{INTEGER}{SCALES}(?:-asym)?(?:-mse)?",
            "any of the integers, one input after another: those that follow make each one's error good (reads text)",
        ),
        ("q4_k", "|".join(KINDS), f"blocks of GGML, as in a GGUF file: {', '.join(KINDS)}"),
    )
}
"""See `phyla.compression.recipes`."""


def named(name: str) -> Quantize:
    """The recipe of a name that one of the methods here has."""
    found = next(filter(None, (re.fullmatch(method.pattern, name) for method in METHODS.values())))
    return _named(found, "")


def quantize(model: LanguageModel, chosen: list[matrices.Place], recipe: Quantize, moments: Moments) -> dict[str, str]:
    """Rounds the chosen parameters, in place; returns those that it leaves, and why."""
    left = {}
    for place in chosen:
        if why := refusal(place, recipe):
            left[place.name] = why
            continue
        dense, axes, turned = inputs_first(place)
        held = rounded(dense, recipe, moments.get(place.path) if place.kind == "matrix" else None)
        matrices.replace(model, place.path, Quantized(held, axes, transposed=turned))
    return left


def refusal(place: matrices.Place, recipe: Quantize) -> str:
    """Why the recipe leaves a parameter; empty: it does not."""
    K = inputs_first(place)[0].shape[-2]
    if recipe.gptq and place.kind == "values":
        return "packed: no text tells of its values by themselves"
    if K < FEWEST:
        return f"of {K} inputs: its scales would take as much room as its codes"
    if recipe.format in KINDS and fitting(recipe.format, K) is None:
        return f"of {K} inputs, which are no whole blocks of 32"
    return ""


def inputs_first(place: matrices.Place) -> tuple[jax.Array, tuple[str, ...], bool]:
    """The parameter as [..., in, out], the names of these dimensions, and whether it is the other way round."""
    dense, axes = place.value[...], place.axes
    if place.kind not in ("table", "values"):  # whose rows are the output channels
        return dense, axes, False
    return dense.swapaxes(-1, -2), (*axes[:-2], axes[-1], axes[-2]), True


def rounded(w: jax.Array, recipe: Quantize, moment: jax.Array | None) -> Format:
    """Every matrix [K, N] of w [..., K, N] as the recipe has it, whatever it is for; to nearest without moments."""
    recipe = dataclasses.replace(recipe, only="")  # so that it is compiled once
    if recipe.gptq and moment is not None:
        return round_with_feedback(w, moment, recipe)
    return round_to_nearest(w, recipe)


@jax.jit(static_argnums=1)
def round_to_nearest(w: jax.Array, recipe: Quantize) -> Format:
    """Every matrix [K, N] of w [..., K, N] by itself, one after another."""
    return each(functools.partial(nearest, recipe), w)


def nearest(recipe: Quantize, w: jax.Array) -> Format:
    """One matrix [K, N], to nearest."""
    match recipe.format:
        case "nf4":
            return quantize_nf4(w)
        case "float8":
            return quantize_float8(w, tensor=recipe.tensor)
        case "ternary":
            return quantize_ternary(w)
        case "int8" if recipe.group is None and not (recipe.asymmetric or recipe.mse):
            return quantize_int8(w, tensor=recipe.tensor)
        case "int8" | "int4" | "int3" | "int2":
            options = {"group": recipe.group, "tensor": recipe.tensor, "least_squares": recipe.mse}
            return quantize_codes(w, bits=recipe.bits, symmetric=not recipe.asymmetric, **options)
    kind = fitting(recipe.format, len(w))
    assert kind is not None
    return quantize_ggml(w, kind=kind)


@jax.jit(static_argnums=2)
def round_with_feedback(w: jax.Array, moment: jax.Array, recipe: Quantize) -> Format:
    """The scales of `round_to_nearest`, the codes of `gptq`, for each matrix [K, N] of w and its moments [K, K]."""

    def one(w: jax.Array, moment: jax.Array) -> Format:
        match held := nearest(recipe, w):
            case Int8():
                step = jnp.broadcast_to(held.scale, w.shape)
                return dataclasses.replace(held, codes=gptq(w, moment, step, -127, 127).astype(jnp.int8))
            case Codes():
                zero, half = held.zeros(), 1 << held.bits - 1
                codes = gptq(w, moment, held.steps(), -half - zero, half - 1 - zero) + zero.astype(jnp.int32)
                return dataclasses.replace(held, codes=pack(codes, held.bits))
        raise AssertionError(recipe)

    return each(one, w, moment)
