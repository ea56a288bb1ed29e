"""AWQ: inputs that are large on average get finer steps (Lin et al. 2023, arXiv 2306.00978).

Each weight is multiplied by a scale s of its input before it is rounded, and the input divided by it: s = mean|x|^r,
over √(max s · min s), with the r of 0, 1/20, … 19/20 after which the output differs least, tr(ΔWᵀ H ΔW) for H = Σ xxᵀ.
Then the range of each group of an output is cut to the share of it, 1, 0.95, … 0.55, after which the group's part of
the output differs least. The authors leave the ranges of queries and keys, whose products multiply each other.

They put 1 / s into the norm or the matrix before; here it multiplies the inputs (`phyla.models.wrapped.Scaled`), so
that each matrix has its own and matrices after gates, recurrences, token shifts and routers have one too.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from phyla.compression import matrices
from phyla.compression.activations import rounded_alone
from phyla.compression.calibrate import Moments, each
from phyla.compression.quantize import Quantize, round_to_nearest
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import Format
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.wrapped import Scaled

POWERS, SHARES = 20, 10
UNCUT = r"\b[qk]\.weight$"
"""The maps to queries and keys."""


@dataclass(frozen=True, kw_only=True)
class Awq(Rule):
    """Rounds every matrix after scaling its inputs; heads and tables to nearest."""

    rounding: Quantize

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"awq-{self.rounding.method}"

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return True

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        able, left = rounded_alone(model, chosen, self.rounding)
        for place in able:
            columns = moments.columns[place.path]
            given = place.value[...], moments[place.path], columns.size / jnp.maximum(columns.tokens, 1)
            cut = not re.search(UNCUT, place.name)
            s, held = awq(*given, dataclasses.replace(self.rounding, only=""), cut)
            matrices.replace(model, place.path, Scaled(Quantized(held, place.axes), 1 / s, place.axes[:-1]))
        return Applied(model, left)


def _named(found: re.Match, only: str) -> Awq:
    bits, group, asymmetric = found.groups()
    format_: Any = f"int{bits}"
    options = {"group": None if group is None else int(group), "asymmetric": asymmetric is not None}
    return Awq(rounding=Quantize(format=format_, **options), only=only)


METHODS = {
    "awq-int4-g128": Method(
        r"awq-int([2348])(?:-g(\d+))?(-asym)?",
        _named,
        "integers, after inputs that are large on average are made smaller and their weights larger (reads text)",
    ),
}
"""See `phyla.compression.recipes`."""


@jax.jit(static_argnums=(3, 4))
def awq(w: jax.Array, moment: jax.Array, size: jax.Array, rounding: Quantize, cut: bool) -> tuple[jax.Array, Format]:
    """The scales s [..., K] and s · w rounded.

    Args:
        w: [..., K, N].
        moment: Σ xxᵀ, [..., K, K].
        size: the mean of |x|, [..., K].
        rounding: how it is rounded.
        cut: whether ranges are cut.
    """

    def rounded(w: jax.Array) -> Format:
        return round_to_nearest(w, rounding)

    def one(w: jax.Array, moment: jax.Array, size: jax.Array) -> tuple[jax.Array, Format]:
        def scales(power: jax.Array) -> jax.Array:
            s = jnp.maximum(size**power, 1e-4)
            return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

        def error(power: jax.Array) -> jax.Array:
            s = scales(power)[:, None]
            change = rounded(w * s).materialize() / s - w
            return jnp.sum(change * jnp.matmul(moment, change, precision=jax.lax.Precision.HIGHEST))

        powers = jnp.arange(POWERS) / POWERS
        s = scales(powers[jnp.argmin(jax.lax.map(error, powers))])
        w = w * s[:, None]
        return s, rounded(ranges_cut(w, moment / (s[:, None] * s), rounded, rounding.group) if cut else w)

    return each(one, w, moment, size)


def ranges_cut(w: jax.Array, moment: jax.Array, rounded: Callable[[jax.Array], Format], group: int | None) -> jax.Array:
    """w [K, N] without what the best range of each group of each column leaves out."""
    K, N = w.shape
    group = min(group or K, K)
    rows = K + -K % group
    of_groups = lambda a: jnp.pad(a, ((0, rows - K), (0, 0))).reshape(-1, group, N)  # noqa: E731
    H_GxRxGxR = jnp.pad(moment, (0, rows - K)).reshape(rows // group, group, rows // group, group)
    H_GxRxR = jnp.einsum("grgs->grs", H_GxRxGxR)
    most_Gx1xN = jnp.max(jnp.abs(of_groups(w)), axis=1, keepdims=True)

    def within(share: jax.Array) -> jax.Array:
        limit = share * most_Gx1xN
        return jnp.clip(of_groups(w), -limit, limit).reshape(rows, N)[:K]

    def error(share: jax.Array) -> jax.Array:
        change = of_groups(rounded(within(share)).materialize() - w)
        return jnp.einsum("grn,grs,gsn->gn", change, H_GxRxR, change, precision=jax.lax.Precision.HIGHEST)

    shares = 1 - jnp.arange(SHARES) / 20
    best_GxN = jnp.argmin(jax.lax.map(error, shares), axis=0)
    return within(shares[best_GxN][:, None])
