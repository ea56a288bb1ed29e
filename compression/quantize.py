"""Rounding to nearest: every matrix, and every table of the vocabulary, becomes a `Quantized`."""

import functools

import jax

from phyla.compression import matrices
from phyla.compression.recipes import Quantize
from phyla.kernels.quantized_matmul import Format, quantize_float8, quantize_int4, quantize_int8, quantize_nf4
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized

FEWEST = 9
"""Inputs of a matrix that is worth it: a float32 scale takes as much room as eight codes of 4 bits."""


def quantize(model: LanguageModel, chosen: list[matrices.Place], recipe: Quantize) -> dict[str, str]:
    """Rounds the chosen parameters, in place; returns those that it leaves, and why."""
    left = {}
    for place in chosen:
        table = place.kind == "table"  # whose rows are the output channels
        dense, axes = (place.value[...].T, place.axes[::-1]) if table else (place.value[...], place.axes)
        if dense.shape[-2] < FEWEST:
            left[place.name] = f"of {dense.shape[-2]} inputs: its scales would take as much room as its codes"
            continue
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
    for _ in w.shape[:-2]:
        one = functools.partial(jax.lax.map, one)
    return one(w)
