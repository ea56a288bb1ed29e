"""The parameters of a layer as those of its units: how important each is, and what remains without some.

A layer is a path, and its units are `phyla.compression.units.Units`; values and moments are by path.
"""

import math

import jax
import jax.numpy as jnp

from phyla.compression.calibrate import Path, each
from phyla.compression.units import Cut, Fixed, Norm, Piece, Units

Arrays = dict[Path, jax.Array]
DAMPING = 0.01
"""Of the mean of the moments' diagonal, added to it."""


def importance(path: Path, units: Units, values: Arrays, moments: Arrays) -> jax.Array:
    """Of each unit, [..., units.count]."""
    found = jnp.float32(1)
    for piece in units.judged:
        size = _size(path, units, piece, values, moments)
        # What reads the units reads all that the other pieces made of them.
        found = size if piece.axis == -2 and _at(path, piece.parameter) in moments else found * size
    if units.used and (moment := moments.get(_at(path, units.used))) is not None:
        use = jnp.trace(moment, axis1=-2, axis2=-1)  # Σ |x|² over its tokens
        found = jnp.where(jnp.any(use > 0), use, found)
    return found


def shrunk(path: Path, units: Units, values: Arrays, threshold: jax.Array | float) -> Arrays:
    """The proximal step of a group lasso: where a unit adds nothing if it is zero (`judged`), it comes nearer to it.

    Its weights there, n in all pieces together, are multiplied by max(0, 1 - threshold √n / their norm) (Yuan and Lin
    2006). Returns the parameters that change; one that is no array (a rounded one) takes no part.
    """
    pieces = [piece for piece in units.judged if _at(path, piece.parameter) in values]
    square, count = jnp.float32(0), 0
    for piece in pieces:
        parts = _parts(values[_at(path, piece.parameter)], path, units, piece)
        lead = _lead(path, units)
        square += jnp.sum(jnp.square(parts), axis=tuple(range(lead + 1, parts.ndim)))
        count += math.prod(parts.shape[lead + 1 :])
    norm = jnp.sqrt(square)
    factor = jnp.maximum(0, 1 - threshold * math.sqrt(count) / jnp.where(norm > 0, norm, 1))
    found: Arrays = {}
    for piece in pieces:
        at = _at(path, piece.parameter)
        w = found.get(at, values[at])
        index = _index(units, piece, jnp.arange(units.count))
        of_entries = jnp.repeat(factor, len(index) // units.count, axis=-1)
        whole = jnp.ones((*factor.shape[:-1], w.shape[piece.axis])).at[..., index].set(of_entries)
        found[at] = w * _along(whole, w.ndim, piece.axis)
    return found


def _along(factors: jax.Array, ndim: int, axis: int) -> jax.Array:
    """[..., n] with the last dimension where `axis` says, of `ndim` in all."""
    *stack, n = factors.shape
    between = ndim + axis - len(stack)
    return factors.reshape(*stack, *(1,) * between, n, *(1,) * (-axis - 1))


def _size(path: Path, units: Units, piece: Piece, values: Arrays, moments: Arrays) -> jax.Array:
    """√Σ of the squares of what a piece gives for each unit: of its weights, or of its products if there is a text."""
    at = _at(path, piece.parameter)
    w, moment = values[at], moments.get(at)
    if moment is None or piece.axis == -3:
        parts = _parts(w, path, units, piece)
        return jnp.sqrt(jnp.sum(jnp.square(parts), axis=tuple(range(_lead(path, units) + 1, parts.ndim))))
    # Without a text the moments are zero; all inputs are alike then.
    moment = jnp.where(jnp.any(moment != 0), moment, jnp.eye(moment.shape[-1]))
    if piece.axis == -1:
        energy = jnp.sum(w * (moment @ w), axis=-2)
        return jnp.sqrt(jnp.sum(_parts(energy, path, units, piece), axis=-1))
    rows = _parts(w, path, units, piece)  # [..., units, each, N]
    index = _index(units, piece, jnp.arange(units.count)).reshape(units.count, -1)
    own = moment[..., index[:, :, None], index[:, None, :]]  # [..., units, each, each]
    return jnp.sqrt(jnp.maximum(jnp.einsum("...ief,...ien,...ifn->...i", own, rows, rows), 0))


def _at(path: Path, parameter: str) -> Path:
    return (*path, *parameter.split("."))


def _lead(path: Path, units: Units) -> int:
    """Dimensions over which the units of a layer's parameters are stacked."""
    return (path[0] == "periods") + units.stack


def _parts(x: jax.Array, path: Path, units: Units, piece: Piece) -> jax.Array:
    """One section of x, its dimension split in two and moved after those of the stack: [..., units, each, rest]."""
    lead, index = _lead(path, units), _index(units, piece, jnp.arange(units.count))
    x = jnp.moveaxis(jnp.take(x, index, axis=piece.axis), piece.axis, lead)
    return x.reshape(*x.shape[:lead], units.count, -1, *x.shape[lead + 1 :])


def _cut_of(units: Units, piece: Piece) -> Cut:
    return next(cut for cut in units.cuts if (cut.parameter, cut.axis) == (piece.parameter, piece.axis))


def _index(units: Units, piece: Piece, kept: jax.Array) -> jax.Array:
    """The entries of the kept units [..., n] in one section: integers [..., n · each]."""
    sections = _cut_of(units, piece).sections
    begin = sum(s.width if isinstance(s, Fixed) else s * units.count for s in sections[: piece.section])
    section = sections[piece.section]
    if isinstance(section, Fixed):
        return jnp.broadcast_to(begin + jnp.arange(section.width), (*kept.shape[:-1], section.width))
    return (begin + kept[..., None] * section + jnp.arange(section)).reshape(*kept.shape[:-1], -1)


def without(path: Path, units: Units, kept: jax.Array, values: Arrays, moments: Arrays) -> dict[Path, jax.Array]:
    """The parameters that have entries of units, with those of the kept ones alone."""
    found: dict[Path, jax.Array] = {}
    for cut in units.cuts:
        at = _at(path, cut.parameter)
        if at not in values:
            continue
        pieces = (Piece(cut.parameter, cut.axis, section) for section in range(len(cut.sections)))
        index = jnp.concatenate([_index(units, piece, kept) for piece in pieces], axis=-1)
        x, moment = found.get(at, values[at]), moments.get(at)
        if cut.axis == -2 and moment is not None:
            found[at] = each(_refitted, x, moment, index)
        else:
            take = lambda x, index, axis=cut.axis: jnp.take(x, index, axis=axis)  # noqa: E731
            for _ in range(kept.ndim - 1):
                take = jax.vmap(take)
            found[at] = take(x, index)
    for norm in units.norms:
        found[_at(path, norm.scale)] *= _rescale(path, units, norm, kept, values, moments)
    return found


@jax.jit
def _refitted(w: jax.Array, moment: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [M, N] for the inputs `index` alone that come nearest to what all of w [K, N] gave of all inputs."""
    diagonal = jnp.diag(moment)
    damping = jnp.where(diagonal > 0, DAMPING * jnp.mean(diagonal), 1)  # an input never seen keeps its row
    others = jnp.ones(len(w)).at[index].set(0)[:, None] * w
    change = jnp.linalg.solve(moment[index][:, index] + jnp.diag(damping[index]), (moment @ others)[index])
    return w[index] + change


def _rescale(path: Path, units: Units, norm: Norm, kept: jax.Array, values: Arrays, moments: Arrays) -> jax.Array:
    """Of the scale of a norm, so that what stays is divided by what it was divided by before.

    The mean square over n of n' entries is n' / n of what it was times the share of the sum of squares that stays.
    """
    energy = jnp.square(_size(path, units, norm.energy, values, moments))
    if norm.reader and (moment := moments.get(_at(path, norm.reader))) is not None:
        scale = jnp.square(values[_at(path, norm.scale)])
        seen = jnp.diagonal(moment, axis1=-2, axis2=-1) / jnp.where(scale > 0, scale, jnp.inf)
        seen = jnp.sum(_parts(seen, path, units, Piece(norm.scale, -1)), axis=-1)
        energy = jnp.where(jnp.any(seen > 0), seen, energy)
    staying = jnp.take_along_axis(energy, kept, axis=-1)
    whole, part = (jnp.sum(e.reshape(*e.shape[:-1], units.buckets, -1), axis=-1) for e in (energy, staying))
    factor = jnp.sqrt(part / jnp.where(whole > 0, whole, 1) * units.count / kept.shape[-1])
    (entries,) = _cut_of(units, Piece(norm.scale, -1)).sections
    assert isinstance(entries, int)
    return jnp.repeat(factor, kept.shape[-1] // units.buckets * entries, axis=-1)
