"""Every matrix, and every table of the vocabulary, becomes a `Quantized`: rounded to nearest, or by GPTQ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.feedback import gptq
from phyla.compression.recipes import Quantize
from phyla.kernels.quantized_matmul import (
    Format,
    Int4,
    Int8,
    quantize_float8,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)
from phyla.kernels.quantized_matmul.packing import pack
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized

FEWEST = 9
"""Inputs of a matrix that is worth it: a float32 scale takes as much room as eight codes of 4 bits."""


def quantize(model: LanguageModel, chosen: list[matrices.Place], recipe: Quantize, moments: Moments) -> dict[str, str]:
    """Rounds the chosen parameters, in place; returns those that it leaves, and why."""
    left = {}
    for place in chosen:
        table = place.kind == "table"  # whose rows are the output channels
        dense, axes = (place.value[...].T, place.axes[::-1]) if table else (place.value[...], place.axes)
        if dense.shape[-2] < FEWEST:
            left[place.name] = f"of {dense.shape[-2]} inputs: its scales would take as much room as its codes"
            continue
        if recipe.gptq and place.kind == "matrix":
            held = round_with_feedback(dense, moments[place.path], recipe.format, recipe.group)
        else:
            held = round_to_nearest(dense, recipe.format, recipe.group)
        matrices.replace(model, place.path, Quantized(held, axes, transposed=table))
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
