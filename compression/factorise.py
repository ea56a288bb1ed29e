"""Matrices become products of two of low rank, where that makes them smaller. Heads and tables are left alone."""

import re
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.feedback import DAMPING
from phyla.compression.rule import Applied, Method, Rule, exactly
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.lowrank import LowRank

LEFT = "heads and tables of the vocabulary, and packed matrices, are not factorised"


@dataclass(frozen=True, kw_only=True)
class Factorise(Rule):
    """Keeps the largest singular values of every matrix."""

    to: Literal["share", "energy", "rank"]
    """What `amount` says: how many parameters the factors have, as a share of the matrix's; how many percent of the
    sum of the squared singular values they keep (of a stack: at least, in each of its matrices); or their rank."""
    amount: float
    weighted: bool = False
    """Of the matrix times the root of the inputs' moments: the product, not the matrix, is then nearest to what it was
    (truncation-aware whitening: Wang et al. 2024, SVD-LLM, arXiv 2403.07378)."""

    def __post_init__(self):
        super().__post_init__()
        name = "asvd" if self.weighted else "svd"
        if self.to == "rank" and self.amount < 1:
            raise UserError(f"{self.method}: the least rank is 1; nearest: {name}-r1")
        if self.to == "share" and not 0 < self.amount < 1:
            raise UserError(
                f"{self.method}: more than 0 and less than 1 of the parameters can stay; nearest: {name}-0.5"
            )
        if self.to == "energy" and not 0 < self.amount < 100:
            raise UserError(f"{self.method}: more than 0 and less than 100 % can stay; nearest: {name}-90%")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return ("asvd-" if self.weighted else "svd-") + {
            "share": f"{self.amount:g}",
            "energy": f"{self.amount:g}%",
            "rank": f"r{self.amount:g}",
        }[self.to]

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.weighted

    def resolve(self, model: LanguageModel, moments: Moments) -> tuple[Rule, ...]:
        """See `Rule.resolve`: that much energy is a rank of each matrix."""
        if self.to != "energy":
            return (self,)
        names: dict[int, list[str]] = {}
        for place in matrices.places(model):
            if self.chooses(place) and place.kind == "matrix":
                values = np.asarray(singular_values(place.value[...], moments.get(place.path)), np.float64)
                kept = np.cumsum(values**2, -1) / np.maximum(np.sum(values**2, -1, keepdims=True), 1e-300)
                enough = (kept < self.amount / 100 - 1e-7).sum(-1) + 1
                names.setdefault(int(enough.max()), []).append(place.name)
        ranks = {rank: exactly(found) for rank, found in sorted(names.items())}
        found = [Factorise(to="rank", amount=rank, weighted=self.weighted, only=only) for rank, only in ranks.items()]
        return tuple(found) or (self,)

    def rank(self, K: int, N: int) -> int:
        """Of the factors of a matrix [K, N]; 0: none is that small. As long as energy is not resolved, the least."""
        return {"share": int(self.amount * K * N / (K + N)), "energy": 1, "rank": int(self.amount)}[self.to]

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left = {}
        for place in chosen:
            *_, K, N = place.value.shape
            rank = self.rank(K, N)
            if place.kind != "matrix":
                left[place.name] = LEFT
            elif rank == 0:
                left[place.name] = f"of {K} × {N}: not even factors of rank 1 are so small"
            elif rank * (K + N) >= K * N:
                left[place.name] = f"of {K} × {N}: factors of rank {rank} would not be smaller"
            else:
                down, up = factors(place.value[...], moments.get(place.path), rank)
                *stack, rows, columns = place.axes
                held = LowRank(
                    matrices.part(place.value, down, (*stack, rows, "rank")),
                    matrices.part(place.value, up, (*stack, "rank", columns)),
                )
                matrices.replace(model, place.path, held)
        return Applied(model, left)


def _methods(name: str, weighted: bool, summary: str, unit: str) -> dict[str, Method]:
    def method(pattern: str, to: Literal["share", "energy", "rank"], summary: str) -> Method:
        def make(found: re.Match, only: str) -> Factorise:
            return Factorise(to=to, amount=float(found[1]), weighted=weighted, only=only)

        return Method(f"{name}-{pattern}", make, summary)

    return {
        f"{name}-0.5": method(r"(\d*\.?\d+)", "share", f"{summary} with 0.5 (or any other share) of its parameters"),
        f"{name}-90%": method(r"(\d+(?:\.\d+)?)%", "energy", f"the same, of the rank that keeps 90 % of {unit}"),
        f"{name}-r16": method(r"r(\d+)", "rank", "the same, of rank 16"),
    }


METHODS = _methods(
    "svd", False, "each matrix is a product of two: the nearest", "the sum of its squared singular values"
) | _methods(
    "asvd", True, "the product whose answers to a text are nearest (reads text)", "the answers' sum of squares"
)
"""See `phyla.compression.recipes`."""


@jax.jit(static_argnums=2)
def factors(w: jax.Array, moment: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
    """The nearest product [..., K, rank] @ [..., rank, N] of each matrix [K, N] of w, as seen by inputs of its moments.

    Both factors have the same singular values.
    """

    def one(w: jax.Array, moment: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        root, inverse = _roots(moment, len(w))
        U, s, Vt = jnp.linalg.svd(_dot(root, w.astype(jnp.float32)), full_matrices=False)
        half = jnp.sqrt(s[:rank])
        return _dot(inverse, U[:, :rank] * half), half[:, None] * Vt[:rank]

    return each(one, w) if moment is None else each(one, w, moment)


@jax.jit
def singular_values(w: jax.Array, moment: jax.Array | None) -> jax.Array:
    """Of each matrix [K, N] of w, times the root of its moments; [..., min(K, N)]."""

    def one(w: jax.Array, moment: jax.Array | None = None) -> jax.Array:
        return jnp.linalg.svd(_dot(_roots(moment, len(w))[0], w.astype(jnp.float32)), compute_uv=False)

    return each(one, w) if moment is None else each(one, w, moment)


def _roots(moment: jax.Array | None, K: int) -> tuple[jax.Array | None, jax.Array | None]:
    """R with RᵀR = H + damping, and its inverse: |R (W - W')| is what the inputs make of the difference.

    Damped as `feedback` damps. None: the identity, which it also is where no input was seen.
    """
    if moment is None:
        return None, None
    mean = jnp.trace(moment) / K
    H = jnp.where(mean > 0, moment / jnp.where(mean > 0, mean, 1) + DAMPING * jnp.eye(K), jnp.eye(K))
    values, Q = jnp.linalg.eigh(H)
    scale = jnp.sqrt(jnp.maximum(values, DAMPING / 2))  # rounding may leave less than the damping
    return scale[:, None] * Q.T, Q / scale


def _dot(a: jax.Array | None, b: jax.Array) -> jax.Array:
    return b if a is None else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
