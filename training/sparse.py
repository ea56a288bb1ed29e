"""Weights that are exactly zero while the others are trained: an optimizer around the optimizer.

Where a mask is 0, the gradient, the moments and the weight are 0, whatever optimizer is inside: what decays, what is
orthogonalised and what has momentum alike. Masks are a part of the optimizer's state: a run that goes on has them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from phyla.compression.parts import shrunk
from phyla.compression.qat import KEPT
from phyla.compression.structure import layers
from phyla.compression.units import UNITS, Amount
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.training.config import SparsityConfig

Name = tuple[str, ...]
"""A path."""
Masks = dict[str, nnx.Variable]
"""By the joined names of their parameters: true where a weight may be other than zero."""
Rate = Callable[[jax.Array], Any]
"""The learning rate at a step."""


class Sparse(NamedTuple):
    """The state."""

    inner: Any
    masks: Masks
    updates: jax.Array  # [] int32, so far


def sparse(
    optimizer: optax.GradientTransformation,
    config: SparsityConfig,
    *,
    steps: int,
    rate: Rate,
    model: ModelConfig,
    pruned: bool,
) -> optax.GradientTransformation:
    """The optimizer with zeros as the configuration says; the same optimizer if it says nothing.

    Masks change before the gradient is used, by the weights as they are then; L1 and the group lasso are proximal
    steps after the update, decoupled from the gradient as AdamW's decay is: so that they too give exact zeros.

    Args:
        optimizer: what is inside; its state is a tree of which parts are like the parameters.
        config: what becomes zero, and when.
        steps: of the run.
        rate: see `Rate`.
        model: whose units the group lasso is for.
        pruned: whether the model that training starts from was pruned, so that its zeros are no accident.

    Raises UserError if the model has not the units that the group lasso is for.
    """
    held, shrinks = config.hold and pruned, config.l1 > 0 or config.group_lasso > 0
    masked = held or config.final > 0
    if not masked and not shrinks:
        return optimizer
    groups = _groups(config, model) if config.group_lasso else []

    def init(params: Any) -> Sparse:
        masks = {}
        for name, variable in _matrices(params).items() if masked else ():
            w = variable[...]
            mask = _nonzero(w) if held else jnp.ones(w.shape, bool)
            if config.final and config.method == "rigl":
                mask &= largest(_scores(w), round((1 - config.final) * w.shape[-2] * w.shape[-1]))
            masks[".".join(name)] = variable.replace(mask)
        return Sparse(optimizer.init(params), masks, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradient = updates
        weights, masks = _matrices(params), state.masks
        if config.final:
            gradients = _matrices(gradient)

            def changed(masks: Masks) -> Masks:
                return {
                    ".".join(name): masks[".".join(name)].replace(
                        _next(config, state.updates, steps, masks[".".join(name)][...], w[...], gradients[name][...])
                    )
                    for name, w in weights.items()
                }

            masks = jax.lax.cond(due(config, state.updates, steps), changed, lambda masks: masks, masks)
        gradient = _masked(gradient, masks)
        updates, inner = optimizer.update(gradient, state.inner, params)
        inner = _masked(inner, masks)
        if masks:
            updates = _map(lambda u, w, mask: jnp.where(mask, u, -w), updates, params, masks)
        if shrinks:
            updates = _proximal(updates, params, config, groups, rate(state.updates))
        return updates, Sparse(inner, masks, state.updates + 1)

    return optax.GradientTransformation(init, update)


def share_of_zeros(config: SparsityConfig, count: jax.Array, steps: int) -> jax.Array:
    """After so many updates: final (1 - (1 - progress)³) (Zhu and Gupta 2017, arXiv 1710.01878, equation 1)."""
    begin, end = _bounds(config, steps)
    progress = jnp.clip((count - begin) / max(1, end - begin), 0, 1)
    return config.final * (1 - (1 - progress) ** 3)


def share_of_swaps(config: SparsityConfig, count: jax.Array, steps: int) -> jax.Array:
    """RigL's cosine: swapped / 2 (1 + cos(π count / end)) (Evci et al. 2020, arXiv 1911.11134, section 3)."""
    end = _bounds(config, steps)[1]
    return config.swapped / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, end) / max(1, end)))


def due(config: SparsityConfig, count: jax.Array, steps: int) -> jax.Array:
    """Whether masks change: every so many updates between begin and end, and at the end."""
    begin, end = _bounds(config, steps)
    now = (count >= begin) & (count < end) & ((count - begin) % config.every == 0)
    return now | (count == end) if config.method == "magnitude" else now


def _bounds(config: SparsityConfig, steps: int) -> tuple[int, int]:
    return round(config.begin * steps), min(round(config.end * steps), steps - 1)


def _next(
    config: SparsityConfig, count: jax.Array, steps: int, mask: jax.Array, w: jax.Array, gradient: jax.Array
) -> jax.Array:
    size = w.shape[-2] * w.shape[-1]
    if config.method == "magnitude":
        keep = size - jnp.round(share_of_zeros(config, count, steps) * size).astype(jnp.int32)
        return mask & largest(jnp.where(mask, jnp.abs(w), -1), keep)
    active = jnp.sum(mask, axis=(-2, -1), keepdims=True)
    swaps = jnp.floor(share_of_swaps(config, count, steps) * active).astype(jnp.int32)
    kept = largest(jnp.where(mask, jnp.abs(w), -1), active - swaps)
    return kept | largest(jnp.where(kept, -1, jnp.abs(gradient)), swaps)


def largest(scores: jax.Array, keep: jax.Array | int) -> jax.Array:
    """Of each matrix [..., K, N] so many (a number, or one for each matrix [..., 1, 1]), true; of equals the first."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    rank = jnp.argsort(jnp.argsort(-flat, axis=-1), axis=-1)
    return rank.reshape(scores.shape) < keep


def _scores(w: jax.Array) -> jax.Array:
    """Magnitudes, and where they are equal (a matrix of zeros) an order at random."""
    return jnp.abs(w) + 1e-12 * jax.random.uniform(jax.random.key(0), w.shape)


def _nonzero(w: jax.Array) -> jax.Array:
    """A matrix that is all zero was never pruned: it begins so (LoRA's B)."""
    return (w != 0) | jnp.all(w == 0, axis=(-2, -1), keepdims=True)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _variables(tree: Any) -> list[tuple[Name, Any]]:
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), node) for path, node in found]


def _matrices(params: Any) -> dict[Name, nnx.Variable]:
    """What `compress` would prune, and of which LSQ learns the steps."""

    def chosen(variable: nnx.Variable) -> bool:
        said = variable.get_metadata()
        return said["matrix"] and said["axes"][-1] not in ("vocab", "kept") and said["precise"] in ("", KEPT)

    return {name: variable for name, variable in _variables(params) if chosen(variable)}


def _masked(tree: Any, masks: Masks) -> Any:
    """Zeros in all that has the path and the shape of a masked parameter: gradients, moments."""
    names = {tuple(name.split(".")): mask for name, mask in masks.items()}
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    out = []
    for (path, node), _ in zip(_variables(tree), found, strict=True):
        mask = next((m for name, m in names.items() if path[-len(name) :] == name), None)
        if mask is not None:
            zeroed = lambda x, m=mask[...]: jnp.where(m, x, 0) if x.shape == m.shape else x  # noqa: E731
            node = jax.tree.map(zeroed, node)
        out.append(node)
    return jax.tree.unflatten(structure, out)


def _map(function: Callable[..., jax.Array], updates: Any, params: Any, masks: Masks) -> Any:
    """function(update, weight, mask) of every masked parameter; other updates as they are."""
    weights = dict(_variables(params))
    structure = jax.tree.structure(updates, is_leaf=_is_variable)
    out = [
        node.replace(function(node[...], weights[name][...], masks[".".join(name)][...]))
        if ".".join(name) in masks
        else node
        for name, node in _variables(updates)
    ]
    return jax.tree.unflatten(structure, out)


def _groups(config: SparsityConfig, model: ModelConfig) -> list[tuple[Name, Any]]:
    """The layers that have such units, by path."""
    found = []
    for path, layer in layers(model):
        find = UNITS[config.groups].get(type(layer))
        units = find(layer, model, Amount(50, True)) if find else ""
        if not isinstance(units, str):
            found += [(path, each) for each in units]
    if not found:
        raise UserError(f"sparsity.groups {config.groups}: this model has none")
    return found


def _proximal(updates: Any, params: Any, config: SparsityConfig, groups: list, rate: Any) -> Any:
    """Updates that end where soft thresholding by rate · l1, and of groups by rate · group_lasso · √size, leads."""
    weights, changes = _matrices(params), _matrices(updates)
    new = {name: w[...] + changes[name][...] for name, w in weights.items()}
    if config.l1:
        for name, w in new.items():
            threshold = rate * weights[name].get_metadata()["learning_rate"] * config.l1
            new[name] = jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0)
    if config.group_lasso:
        # By the layer's own names: without what holds the model, and without what wraps a weight.
        plain = {_plain(name): name for name in new}
        for path, units in groups:
            found = shrunk(path, units, {at: new[name] for at, name in plain.items()}, rate * config.group_lasso)
            new |= {plain[at]: w for at, w in found.items()}
    structure = jax.tree.structure(updates, is_leaf=_is_variable)
    out = [node.replace(new[name] - weights[name][...]) if name in new else node for name, node in _variables(updates)]
    return jax.tree.unflatten(structure, out)


def _plain(name: Name) -> tuple[Any, ...]:
    parts = [int(part) if part.isdigit() else part for part in name if part != "body"]
    return tuple(parts[1:]) if parts[0] == 0 else tuple(parts)
