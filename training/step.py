"""One training step, pure: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phyla.models.weights import trainable
from phyla.training.config import LoopConfig
from phyla.training.objectives import Batch, Objective


class TrainState(NamedTuple):
    """All that changes while training, and what it needs beside that."""

    step: jax.Array  # [] int32, steps taken, skipped ones included
    params: nnx.State  # of the model, those that are trained
    objective: nnx.State  # parameters that the objective itself has (projections); usually none
    optimizer: Any  # over both
    ema: nnx.State | None  # of params
    key: jax.Array  # [2] uint32, the seed's key data; a step uses the key folded with its number
    skipped: jax.Array  # [] int32, non-finite updates so far
    skipped_in_a_row: jax.Array  # [] int32
    frozen: tuple[nnx.State, nnx.State]  # of the model and of the objective (a teacher): used, never changed


NOTHING = nnx.State({})
Learned = tuple[nnx.State, nnx.State]
"""Of the model and of the objective."""


class Metrics(NamedTuple):
    """Of one step, [] float32 each."""

    loss: jax.Array  # nats per token, without penalty
    tokens: jax.Array  # that the loss counts
    gradient_norm: jax.Array  # before clipping
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    extra: dict[str, jax.Array]  # the objective's own, per token


def split(module: Any) -> tuple[Any, nnx.State, nnx.State]:
    """What stays the same, what is trained, and what is frozen, of a model or of an objective.

    An objective that is a function has no parameters; one that is an `nnx.Module` is split as a model is.
    """
    if not isinstance(module, nnx.Module):
        return module, NOTHING, NOTHING
    graphdef, trained, frozen = nnx.split(module, trainable, ...)
    return graphdef, trained, frozen


def initial_state(
    params: nnx.State, optimizer: optax.GradientTransformation, config: LoopConfig, objective: nnx.State = NOTHING
) -> TrainState:
    """Before the first step, with nothing frozen.

    Args:
        params: of the model, those that are trained.
        optimizer: of (params, objective).
        config: of the loop.
        objective: parameters of its own.
    """
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        objective=objective,
        optimizer=optimizer.init((params, objective)),
        ema=jax.tree.map(jnp.copy, params) if config.ema else None,
        key=jax.random.key_data(jax.random.key(config.seed)),
        skipped=zero,
        skipped_in_a_row=zero,
        frozen=(NOTHING, NOTHING),
    )


def make_step(
    graphdef: nnx.GraphDef, objective: Objective, optimizer: optax.GradientTransformation, config: LoopConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step for a model's graph.

    The gradient is Σ over microbatches of the loss sums' gradients, over Σ of their weights: exactly that of the
    whole batch. (A penalty that is no sum over tokens, such as a balance of experts, is each microbatch's own.) A
    non-finite loss or gradient leaves parameters and optimizer as they were and is counted.
    """
    objective_graphdef = split(objective)[0]

    def minimised(learned: Learned, frozen: Learned, batch: Batch, rng: jax.Array):
        (params, own), (other, own_other) = learned, frozen
        ask = objective
        if isinstance(objective, nnx.Module):
            ask = nnx.merge(objective_graphdef, own, own_other)
        loss = ask(nnx.merge(graphdef, params, other), batch, rng)
        return loss.total + loss.penalty, (loss.total, loss.weight, loss.metrics)

    def sums(learned: Learned, frozen: Learned, batch: Batch, rng: jax.Array):
        of = jax.value_and_grad(minimised, has_aux=True)
        (value, (total, weight, extra)), gradient = of(learned, frozen, batch, rng)
        return value, total, weight, extra, gradient

    def accumulated(learned: Learned, frozen: Learned, batch: Batch, rng: jax.Array):
        n = config.microbatches
        if n == 1:
            return sums(learned, frozen, batch, rng)
        # Row r goes to microbatch r % n: every device keeps its rows.
        parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(rng, n)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, learned, frozen, batch, rng))

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, sums(learned, frozen, *part)), None

        return jax.lax.scan(add, zeros, (parts, keys))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        learned = state.params, state.objective
        value, total, weight, extra, gradient = accumulated(learned, state.frozen, batch, rng)
        weight = jnp.maximum(weight, 1.0)
        loss, gradient, extra = jax.tree.map(lambda x: x / weight, (total, gradient, extra))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        updates, optimizer_state = optimizer.update(gradient, state.optimizer, learned)
        params, own = cast(Learned, optax.apply_updates(learned, updates))
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: config.ema * old + (1 - config.ema) * new, ema, params)
        new = params, own, optimizer_state, ema
        old = state.params, state.objective, state.optimizer, state.ema
        params, own, optimizer_state, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        state = TrainState(
            state.step + 1, params, own, optimizer_state, ema, state.key, skipped, in_a_row, state.frozen
        )
        return state, Metrics(loss, weight, norm, skipped, in_a_row, extra)

    return step


def compile_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], state: Any, batch: Any, layout: Any, mesh: Mesh
) -> jax.stages.Compiled:
    """The step, compiled once for these shapes; the old state's memory becomes the new one's.

    The mesh is the context, by which kernels and mixtures of experts divide their work over its devices.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=(layout, whole)).lower(state, batch).compile()
