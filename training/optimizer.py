"""Optimizers and schedules from optax, applied by the metadata that the models put on their parameters."""

from typing import Any

import jax
import optax
from flax import nnx

from phyla.training.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step: a linear warmup, then as configured."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = round(config.warmup_fraction * steps)
    after = max(1, steps - warmup)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * steps))
        rest = optax.linear_schedule(peak, final, decay, transition_begin=after - decay)
    else:
        rest = optax.constant_schedule(peak)
    # The first update already moves: step 0 of the warmup has 1/warmup of the peak.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, rest], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer with decoupled weight decay, for `params`' structure and metadata.

    A parameter's metadata say whether it decays, whether it is a matrix (for Muon) and what multiplies its
    learning rate.
    """
    if config.name == "adamw":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.beta1, config.beta2)
    elif config.name == "adafactor":
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        muon = optax.contrib.muon(
            1.0,
            beta=config.beta1,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_muon_dimensions(params),
            consistent_rms=0.2,  # AdamW's, so that one learning rate serves both (Liu et al. 2025)
        )
        direction = optax.chain(muon, optax.scale(-1.0))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=metadata(params, "weight_decay")),
        _multiply(metadata(params, "learning_rate")),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def state_bytes(config: OptimizerConfig, params: Any) -> int:
    """Of the optimizer's state for `params`, or for shapes in their place; nothing is computed."""
    state = jax.eval_shape(make_optimizer(config, 1, params).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def metadata(params: Any, name: str) -> Any:
    """One metadata entry of every parameter, as a tree."""
    return _map_variables(lambda variable: variable.get_metadata()[name], params)


def _map_variables(function: Any, tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _muon_dimensions(params: Any) -> Any:
    """Matrices are (…, in, out); None leaves the parameter to AdamW."""

    def dimensions(variable: nnx.Variable) -> optax.contrib.MuonDimensionNumbers | None:
        n = variable.ndim
        return optax.contrib.MuonDimensionNumbers(n - 2, n - 1) if variable.get_metadata()["matrix"] else None

    return _map_variables(dimensions, params)


def _multiply(factors: Any) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        scaled = jax.tree.map(lambda f, u: u if f == 1.0 else jax.tree.map(lambda x: f * x, u), factors, updates)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
