"""Quantized matmul for TPUs: which kernel, which blocks, and what is prepared for it.

| rows of x | int8, int4 | dynamic int8 | float8, NF4 |
|---|---|---|---|
| up to 32 | codes | codes | dense |
| more | dense | codes | dense |
| transposed, any | dense | dense | dense |

codes: `tpu_codes`, integers on the matrix unit; dense: `tpu_dense`, blocks dequantized on chip. Beside the results only
what belongs to x or to scales is prepared before: planes of x, and the scales of NF4's scales, for each block (K N / 16
bytes, which the compiler keeps on chip where it can) unless whole columns share them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phyla.kernels.dispatch import Unfit
from phyla.kernels.partition import per_device
from phyla.kernels.quantized_matmul.codes import Int4
from phyla.kernels.quantized_matmul.formats import Channels, Float8, Format, Outliers, round_rows
from phyla.kernels.quantized_matmul.nf4 import NF4
from phyla.kernels.quantized_matmul.tpu_codes import matmul_codes
from phyla.kernels.quantized_matmul.tpu_dense import matmul_dense
from phyla.kernels.tpu import LANES, kind

FEW = 32
"""Rows of x up to which a product is bound by reading the weights."""
FLOAT8 = ("TPU7x",)
"""Chips whose matrix unit multiplies float8; elsewhere it is bfloat16 there, which changes no product."""
PIECES = (512, 256, 128, 64, 32)
"""A group of more rows than the first is treated as several of the same scale."""


class Block(NamedTuple):
    """At most: rows of x, results, and terms of a sum in a step."""

    rows: int
    results: int
    terms: int


BLOCKS = {"few": Block(32, 1024, 4096), "codes": Block(512, 1024, 1024), "dense": Block(512, 1024, 512)}
"""For every chip: all have room for them, and the same unit multiplies 128 × 128 or more of a block at once."""


def product(x, w, *, block: Block | None = None):
    """X [M, K] by the matrix that `w` stands for.

    Raises:
        Unfit: the rows of the matrix cannot be cut into groups and blocks.
    """
    body = w.body if isinstance(w, Outliers) else w
    few, dynamic = len(x) <= FEW, isinstance(body, Channels) and body.dynamic
    codes = (dynamic or few) and not isinstance(body, Float8 | NF4)
    most = block or BLOCKS["few" if few else "codes" if codes else "dense"]
    group = _group(body)
    terms = _cut(body.shape[0], most.terms, _unit(body, group))
    arrays = _arrays(body, group)
    if isinstance(w, Outliers):
        chosen_OxK = _chosen(w)
        outer_x = _exactly(x, chosen_OxK.T).astype(x.dtype)
        arrays |= {"outer_x": (outer_x, "B O"), "outer_w": (w.values, "O H")}
        x = jnp.where(chosen_OxK.any(0), 0, x)
    dtype, of_rows = x.dtype, ("outer_x", "row_scale")
    if isinstance(body, Float8) and dynamic:
        x, scale = round_rows(x, jnp.float8_e4m3fn)
        x, arrays["row_scale"] = x if kind() in FLOAT8 else x.astype(jnp.bfloat16), (scale[:, None], "B U")

    def run(x, *values):
        rows = len(x)
        bm = min(most.rows, rows + -rows % (8 if codes else 16))
        pad = lambda v: jnp.pad(v, ((0, -rows % bm), (0, 0)))  # noqa: E731
        a = {name: pad(v) if name in of_rows else v for name, v in zip(arrays, values, strict=True)}
        sizes = bm, _results(a["codes"].shape[1], most.results), terms
        options = {"kind": _kind(body), "group": group, "block": sizes, "dtype": dtype}
        if codes:
            count = 1 if dynamic else 2 if dtype == jnp.bfloat16 else 3
            y = matmul_codes(pad(x), a, count=count, **options)
        else:
            y = matmul_dense(pad(x), a, **options)
        return (y[:rows],)

    dims = [dims for _, dims in arrays.values()]
    (y,) = per_device(run, ["B K", *dims], ["B H"])(x, *(array for array, _ in arrays.values()))
    return y


def transposed(g, w, *, block: Block | None = None):
    """G [M, N] by the transposed matrix."""
    if isinstance(w, Outliers):
        chosen_OxK = _chosen(w)
        outer_MxO = jnp.matmul(g.astype(jnp.float32), w.values.T, precision=jax.lax.Precision.HIGHEST)
        dx = transposed(g, w.body, block=block)
        return jnp.where(chosen_OxK.any(0), _exactly(outer_MxO, chosen_OxK).astype(g.dtype), dx)
    most, group, dtype = block or BLOCKS["few" if len(g) <= FEW else "dense"], _group(w), g.dtype
    arrays = _arrays(w, group)
    if isinstance(w, Channels):
        g = (g.astype(jnp.float32) * arrays.pop("scale")[0]).astype(dtype)

    def run(g, *values):
        (rows, N), codes = g.shape, values[0]
        bm = min(most.rows, rows + -rows % 16)
        bn = min(most.terms, N + -N % LANES)
        if most.terms < N:
            bn = max(size for size in range(LANES, bn + 1, LANES) if size == LANES or N % size == 0)
        g = jnp.pad(g, ((0, -rows % bm), (0, -N % bn)))
        a = {name: jnp.pad(v, ((0, 0), (0, -N % bn))) for name, v in zip(arrays, values, strict=True)}
        bk = _cut(len(codes) * (1 if isinstance(w, Channels) else 2), most.results, _unit(w, group))
        options = {"kind": _kind(w), "group": group, "block": (bm, bk, bn), "dtype": dtype, "transpose": True}
        return (matmul_dense(g, a, **options)[:rows],)

    dims = [dims.replace("H", "N").replace("K", "H") for _, dims in arrays.values()]
    (dx,) = per_device(run, ["B N", *dims], ["B H"])(g, *(array for array, _ in arrays.values()))
    return dx


def _kind(w: Format) -> str:
    return type(w).__name__.lower()


def _group(w: Format) -> int:
    """Rows that share a scale, as far as the kernels need to know; K where there is one scale for a column."""
    K, _ = w.shape
    if isinstance(w, Channels):
        return K
    if not isinstance(w, Int4 | NF4):
        raise Unfit(f"no kernel reads {type(w).__name__}")
    group = whole = min(w.group, K)
    if group > PIECES[0]:
        group = next((piece for piece in PIECES if group % piece == 0), group)
    if K % whole or group % PIECES[-1] or group > PIECES[0]:
        raise Unfit(f"{K} rows in groups of {whole}; groups must divide the rows and be multiples of {PIECES[-1]}")
    return group


def _chosen(w: Outliers) -> jax.Array:
    """Which column of x each outlier is, bool [O, K]: a TPU gathers and scatters slowly, but multiplies fast."""
    return w.columns[:, None] == jnp.arange(w.shape[0])


def _exactly(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """x @ chosen, float32, of which no number is rounded."""
    return jnp.matmul(
        x, chosen.astype(x.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _unit(w: Format, group: int) -> int:
    """What the rows of a block are a multiple of, if they are not all."""
    return LANES if isinstance(w, Channels) else math.lcm(group, LANES)


def _cut(size: int, most: int, unit: int) -> int:
    """The largest multiple of `unit` up to `most` that divides `size`; else all of it."""
    if size <= most:
        return size
    fitting = [cut for cut in range(unit, most + 1, unit) if size % cut == 0]
    if not fitting and size > 4 * most:
        raise Unfit(f"{size} rows have no divisor that is a multiple of {unit} and at most {most}")
    return max(fitting, default=size)


def _results(N: int, most: int) -> int:
    """Columns of a block; the last one may reach over the edge."""
    return N if most >= N else max((c for c in range(LANES, most + 1, LANES) if N % c == 0), default=most)


def _arrays(w: Format, group: int) -> dict[str, tuple[jax.Array, str]]:
    """What the kernels take of a weight, and the names of its dimensions for `per_device`."""
    if isinstance(w, Channels):
        return {"codes": (w.codes, "K H"), "scale": (jnp.broadcast_to(w.scale, (1, w.shape[1])), "U H")}
    if isinstance(w, NF4):
        of_scales = w.scales_of_scales()
        return {
            "codes": (w.codes, "K H"),
            "scale": (w.scale_codes, "K H"),
            "of_scales": (of_scales, "U H" if len(of_scales) == 1 else "K H"),
            "mean": (w.scale_mean.reshape(1, 1), "U U"),
        }
    assert isinstance(w, Int4)
    pieces = min(w.group, w.rows) // group
    arrays = {"codes": (w.codes, "K H"), "scale": (jnp.repeat(w.scales(), pieces, 0), "K H")}
    if w.zero is not None:
        zero = jnp.broadcast_to(w.zero, w.scales().shape)
        arrays["zero"] = jnp.repeat(zero, pieces, 0), "K H"
    return arrays
