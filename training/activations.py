"""What the matrices of a model multiply, and so how much rounding it to 8 bits would lose: a part of the report."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Column, Table

from phyla.compression.calibrate import OUTLIER, Columns, Path
from phyla.compression.matrices import dotted


def activations(columns: dict[Path, Columns], layer: Callable[[Path], str]) -> dict[str, dict[str, Any]]:
    """For each parameter, by name, the worst of its stack's matrices.

    kurtosis: E[x⁴] / E[x²]² over all that a matrix multiplies; 3 if it is normal. The larger it is, the more of the
        range of one scale for all is empty (Chiang et al. 2024, Quamba, arXiv 2410.13229).
    largest: the maximum of |x|.
    outliers: inputs that reach `OUTLIER`.
    layer: the kind of layer that it belongs to.
    """
    found = {}
    for path, each in columns.items():
        tokens = jnp.maximum(each.tokens[..., 0], 1)
        square, fourth = (jnp.mean(sums, axis=-1) / tokens for sums in (each.square, each.fourth))
        worst = {
            "kurtosis": jnp.max(jnp.where(square > 0, fourth / jnp.maximum(square, 1e-30) ** 2, 0)),
            "largest": jnp.max(each.largest),
            "outliers": jnp.max(jnp.sum(each.largest >= OUTLIER, axis=-1)),
        }
        described = {"layer": layer(path), "inputs": each.square.shape[-1]}
        found[dotted(path)] = described | {name: float(value) for name, value in worst.items()}
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """A row for each kind of matrix: the worst of them."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, row in found.items():
        rows.setdefault(f"{row['layer']} {name.split('.weight')[0].rsplit('.', 1)[-1]}", []).append(row)
    titles = ("kurtosis", "largest", f"reach {OUTLIER:g}")
    shown = Table("what it multiplies", *(Column(title, justify="right") for title in titles))
    for name, group in sorted(rows.items()):
        kurtosis, largest = (np.max([row[key] for row in group]) for key in ("kurtosis", "largest"))
        worst = max(group, key=lambda row: row["outliers"])
        shown.add_row(name, f"{kurtosis:,.1f}", f"{largest:,.1f}", f"{worst['outliers']:.0f} of {worst['inputs']}")
    return shown
