"""Quantized matmul for GPUs: what is prepared for the kernel (`gpu_blocks`), forward and transposed.

Beside the results only what belongs to x or to scales is prepared before: parts of x, and NF4's scales as float32
(K N / 16 bytes). Sizes that are no multiples of 64 and 128 cost a copy of the codes. Dynamic float8 is multiplied as
bfloat16, which changes no product: Hopper's own sums of float8 keep 14 bits.
"""

import math

import jax
import jax.numpy as jnp

from phyla.kernels.dispatch import Unfit
from phyla.kernels.gpu import pad
from phyla.kernels.gpu_attention import fit_chip
from phyla.kernels.partition import per_device
from phyla.kernels.quantized_matmul.codes import Int4
from phyla.kernels.quantized_matmul.formats import Channels, Float8, Format, Int8, Outliers, round_rows
from phyla.kernels.quantized_matmul.gpu_blocks import DEPTH, matmul
from phyla.kernels.quantized_matmul.nf4 import NF4

PIECE = 16
"""Rows of codes of a group are a multiple of it."""


def product(x, w):
    """X [M, K] by the matrix that `w` stands for.

    Raises:
        Unfit: a format that has no kernel, groups that are no multiples of 32 rows, or a chip other than Hopper.
    """
    return _product(x, w, x.dtype)


def transposed(g, w):
    """G [M, N] by the transposed matrix."""
    if isinstance(w, Outliers):
        outer = jnp.matmul(g.astype(jnp.float32), w.values.T.astype(jnp.float32), precision="highest")
        return transposed(g, w.body).at[:, w.columns].set(outer.astype(g.dtype), mode="drop")
    arrays, options = _arrays(w)
    if isinstance(w, Channels):
        g = (g.astype(jnp.float32) * arrays.pop("scale")[0]).astype(g.dtype)
    K, dtype = w.shape[0], g.dtype

    def run(g, *values):
        return (matmul(_parts(g)[:, None], _named(arrays, values), transpose=True, dtype=dtype, **options),)

    # Rows are divided among devices if that cuts no piece.
    rows = "H" if options["piece"] is None or len(w.codes) % options["piece"] == 0 else "K"
    dims = [dims.replace("H", "N").replace("K", rows) for _, dims in arrays.values()]
    (dx,) = per_device(run, ["B N", *dims], [f"B {rows}"])(g, *(array for array, _ in arrays.values()))
    return dx[:, :K]


def _product(x, w, dtype):
    """The same with a result of another dtype."""
    if isinstance(w, Outliers):
        chosen = x.at[:, w.columns].get(mode="fill", fill_value=0).astype(jnp.float32)
        outer = jnp.matmul(chosen, w.values.astype(jnp.float32), precision="highest")
        return (_product(x.at[:, w.columns].set(0, mode="drop"), w.body, jnp.float32) + outer).astype(dtype)
    arrays, options = _arrays(w)
    x = pad(x, 1, options["planes"])
    if isinstance(w, Channels) and w.dynamic:
        x, scale = round_rows(x, w.codes.dtype)
        arrays["row_scale"] = scale, "B"
        x = x.astype(jnp.bfloat16) if isinstance(w, Float8) else x

    def run(x, *values):
        M, K = x.shape
        planes = jnp.moveaxis(_parts(x).reshape(-1, M, K // options["planes"], options["planes"]), 3, 1)
        return (matmul(planes, _named(arrays, values), transpose=False, dtype=dtype, **options),)

    dims = [dims for _, dims in arrays.values()]
    (y,) = per_device(run, ["B K", *dims], ["B H"])(x, *(array for array, _ in arrays.values()))
    return y


def _parts(x):
    """X [M, K] as a sum of bfloat16, [parts, M, K]: three are a float32. Int8 is as it is."""
    if x.dtype != jnp.float32:
        return x[None]
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, 8, 7)  # a cast to bfloat16 and back, XLA may leave out
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.stack(parts)


def _named(arrays, values):
    return dict(zip(arrays, values, strict=True))


def _arrays(w: Format):
    """What the kernel takes of a weight, with the names of its dimensions for `per_device`; and its options."""
    fit_chip("quantized_matmul")
    if type(w) in (Int8, Float8):
        assert isinstance(w, Channels)
        arrays = {"codes": (w.codes, "K H"), "scale": (jnp.broadcast_to(w.scale, (1, w.shape[1])), "U H")}
        return arrays, {"kind": type(w).__name__.lower(), "planes": 1, "piece": None}
    if type(w) not in (Int4, NF4):
        raise Unfit(f"there is no kernel for {type(w).__name__}")
    assert isinstance(w, Int4 | NF4)
    rows, group = len(w.codes), w.group // 2
    if w.group >= w.rows:
        group = rows + -rows % DEPTH
    if group % PIECE:
        raise Unfit(f"{w.rows} rows in groups of {w.group}; groups must be multiples of {2 * PIECE} rows")
    piece = math.gcd(group, DEPTH)

    def by_pieces(v):
        return jnp.repeat(v.astype(jnp.float32), group // piece, 0)[: -(-rows // piece)], "K H"

    arrays = {"codes": (w.codes, "K H"), "scale": by_pieces(w.scales())}
    if isinstance(w, Int4) and w.zero is not None:
        arrays["shift"] = by_pieces(w.of_groups(w.zero) * w.scales())
    return arrays, {"kind": type(w).__name__.lower(), "planes": 2, "piece": piece}
