"""Weights of the matrices become zero. Heads and tables are left alone."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, each
from phyla.compression.feedback import sparsegpt, sparsegpt_groups
from phyla.compression.rule import Applied, Method, Rule
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel

LEFT = "heads and tables of the vocabulary are not pruned, nor what is packed"


Measure = Literal["magnitude", "wanda", "sparsegpt"]
"""By what weights are chosen to go: |w|; |w| · ‖x‖ among those of an output (Sun et al. 2023, arXiv 2306.11695); or
what their loss costs after the others have made it good (`feedback`)."""
Among = Literal["matrix", "output", "all"]
"""Which weights are compared: those of a matrix, of one of its outputs (a row, where it is stored as [out, in]), or of
all matrices together, some of which then lose more than others."""
SUFFIXES: dict[Among, str] = {"matrix": "", "output": "-rows", "all": "-global"}


@dataclass(frozen=True, kw_only=True)
class Prune(Rule):
    """Sets weights to zero."""

    by: Measure = "magnitude"

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.by != "magnitude"


@dataclass(frozen=True, kw_only=True)
class PruneSmallest(Prune):
    """Sets a share of the weights to zero: the least of each matrix, of each output, or of all matrices together."""

    percent: float
    among: Among = "matrix"
    """Wanda's is an output always, and SparseGPT's as its source has it."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.percent < 100:
            raise UserError(f"{self.method}: more than 0 and less than 100 % can go; nearest: {self.by}-50%")
        if self.among != "matrix" and self.by != "magnitude":
            raise UserError(
                f"{self.method}: what is compared is to choose for magnitudes alone; nearest: {self.by}-50%"
            )

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"{self.by}-{self.percent:g}%" + SUFFIXES[self.among]

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        return Applied(model, prune_smallest(chosen, self, moments))


@dataclass(frozen=True, kw_only=True)
class PruneGroups(Prune):
    """Keeps the `keep` largest of every `group` consecutive inputs of each output (N:M, as in 2:4)."""

    keep: int
    group: int

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.keep < self.group:
            group = max(2, self.group)
            nearest = f"{self.by}-{min(max(1, self.keep), group - 1)}:{group}"
            raise UserError(f"{self.method}: at least 1 stays, and fewer than there are; nearest: {nearest}")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"{self.by}-{self.keep}:{self.group}"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        return Applied(model, prune_groups(chosen, self, moments))


SHARE = r"-(\d+(?:\.\d+)?)%"


def _share(by: Measure, summary: str, among: Among = "matrix") -> Method:
    make = lambda found, only: PruneSmallest(by=by, percent=float(found[1]), among=among, only=only)  # noqa: E731
    return Method(by + SHARE + SUFFIXES[among], make, summary)


def _groups(by: Measure, summary: str) -> Method:
    make = lambda found, only: PruneGroups(by=by, keep=int(found[1]), group=int(found[2]), only=only)  # noqa: E731
    return Method(by + r"-(\d+):(\d+)", make, summary)


METHODS = {
    "magnitude-50%": _share("magnitude", "the smallest 50 % (or any other share) of each matrix become zero"),
    "magnitude-50%-rows": _share("magnitude", "the same of each output of a matrix by itself", "output"),
    "magnitude-50%-global": _share(
        "magnitude", "the smallest 50 % (or any other share) of all matrices together become zero", "all"
    ),
    "magnitude-2:4": _groups("magnitude", "of every 4 inputs of an output the 2 largest stay (or any N of M)"),
    "wanda-50%": _share(
        "wanda", "as magnitude, times the size of the input, and of each output by itself (reads text)"
    ),
    "wanda-2:4": _groups(
        "wanda", "of every 4 inputs of an output the 2 largest, times the size of the input (reads text)"
    ),
    "sparsegpt-50%": _share("sparsegpt", "what costs least after the other inputs made it good (reads text)"),
    "sparsegpt-2:4": _groups("sparsegpt", "2 of every 4 inputs of an output stay, in the same way (reads text)"),
}
"""See `phyla.compression.recipes`."""


def prune_smallest(chosen: list[matrices.Place], recipe: PruneSmallest, moments: Moments) -> dict[str, str]:
    """Sets exactly the share, rounded of whatever is compared, to zero, in place; returns what it leaves, and why.

    Of a stack, each layer's or expert's matrix is one by itself.
    """
    pruned, left = _matrices(chosen)
    if recipe.among == "all" and pruned:
        flat = jnp.concatenate([place.value[...].ravel() for place in pruned])
        ends = np.cumsum([place.value.size for place in pruned])[:-1]
        values = jnp.split(_least_to_zero(flat[None], jnp.abs(flat[None]), recipe.percent)[0], ends)
    else:
        values = [_share_to_zero(place.value[...], moments.get(place.path), recipe) for place in pruned]
    for place, w in zip(pruned, values, strict=True):
        place.value[...] = w.reshape(place.value.shape)
    return left


def prune_groups(chosen: list[matrices.Place], recipe: PruneGroups, moments: Moments) -> dict[str, str]:
    """Keeps the largest of every group of inputs, in place; returns what it leaves, and why.

    Where the groups do not divide the inputs the last group is shorter, and as many of it stay.
    """
    pruned, left = _matrices(chosen)
    for place in pruned:
        w, moment = place.value[...], moments.get(place.path)
        if recipe.by == "sparsegpt":
            assert moment is not None
            of_one = functools.partial(sparsegpt_groups, keep=recipe.keep, group=recipe.group)
            place.value[...] = each(of_one, w, moment)
        else:
            place.value[...] = largest_of_groups(w, _importance(w, moment), recipe.keep, recipe.group)
    return left


def _matrices(chosen: list[matrices.Place]) -> tuple[list[matrices.Place], dict[str, str]]:
    pruned = [place for place in chosen if place.kind == "matrix"]
    return pruned, {place.name: LEFT for place in chosen if place.kind != "matrix"}


def _share_to_zero(w: jax.Array, moment: jax.Array | None, recipe: PruneSmallest) -> jax.Array:
    if recipe.by == "sparsegpt":
        assert moment is not None
        return each(functools.partial(sparsegpt, percent=recipe.percent), w, moment)
    importance = _importance(w, moment)
    if recipe.by == "wanda" or recipe.among == "output":
        columns = w.swapaxes(-1, -2)
        found = _least_to_zero(_rows(columns, 1), _rows(importance.swapaxes(-1, -2), 1), recipe.percent)
        return found.reshape(columns.shape).swapaxes(-1, -2)
    return _least_to_zero(_rows(w, 2), _rows(importance, 2), recipe.percent)


def _importance(w: jax.Array, moment: jax.Array | None) -> jax.Array:
    """|w|, times the norm of its input if the moments [..., K, K] are known."""
    if moment is None:
        return jnp.abs(w)
    norm = jnp.sqrt(jnp.diagonal(moment, axis1=-2, axis2=-1))
    return jnp.abs(w) * norm[..., None]


def _rows(w: jax.Array, dimensions: int) -> jax.Array:
    """The last dimensions as one, those before as another."""
    return w.reshape(-1, math.prod(w.shape[w.ndim - dimensions :]))


@jax.jit(static_argnums=2)
def _least_to_zero(w_SxN: jax.Array, importance_SxN: jax.Array, percent: float) -> jax.Array:
    """Of each row; of equals the first go."""
    count = round(percent / 100 * w_SxN.shape[1])
    least_SxC = jnp.argsort(importance_SxN, axis=1)[:, :count]
    return w_SxN.at[jnp.arange(len(w_SxN))[:, None], least_SxC].set(0)


@jax.jit(static_argnums=(2, 3))
def largest_of_groups(w: jax.Array, importance: jax.Array, keep: int, group: int) -> jax.Array:
    """w [..., K, N] with zeros but for the `keep` most important of each `group` consecutive rows of a column."""
    *stack, K, N = w.shape
    padding = [(0, 0)] * len(stack) + [(0, -K % group), (0, 0)]
    importance = jnp.pad(importance, padding, constant_values=-1.0).reshape(*stack, -1, group, N)
    rank = jnp.argsort(jnp.argsort(-importance, axis=-2), axis=-2)
    kept = (rank < keep).reshape(*stack, -1, N)[..., :K, :]
    return jnp.where(kept, w, 0)
