"""Fewer layers: those that change the residual stream least are taken out, or consecutive ones become one.

How much a block changes the stream is 1 - cos(x, y) of its input and output, summed over the tokens of a text or of
random ones (Men et al. 2024, arXiv 2403.03853, "block influence"). What repeats is the pattern: whole repeats go where
the number allows it, else the same blocks of the pattern in every repeat. The prefix stays.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from phyla.compression import matrices
from phyla.compression.calibrate import Moments
from phyla.compression.parts import Arrays
from phyla.compression.rule import Applied, Method, Rule
from phyla.compression.structure import AMOUNT, Shrink, check_dense, rebuilt
from phyla.compression.units import Amount, Units
from phyla.models.block import Block
from phyla.models.config import ModelConfig
from phyla.models.cursor import start
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel, ModelState
from phyla.models.mixers.rwkv7 import RWKV7Config

RANDOM = 4, 64
"""Sequences and their length, of random tokens."""
PERIODS = ("periods", "blocks")


@dataclass(frozen=True, kw_only=True)
class PruneLayers(Shrink):
    """Takes out blocks."""

    what: str = "layers"

    def __post_init__(self):
        super().__post_init__()
        check_whole(self)

    def measure(self, model: LanguageModel, batches: Iterable[tuple[jax.Array, jax.Array]]) -> Moments:
        """See `Rule.measure`: `influence`."""
        return influence(model, batches)

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        check_dense(self, model)
        config = model.config
        if not self.text:
            tokens = jax.random.randint(key, RANDOM, 0, _vocabulary(config))
            moments = influence(model, [(tokens, jnp.ones_like(tokens))])
        changes = jnp.stack([moments[*PERIODS, i] for i in range(len(config.pattern))])  # [pattern, sets]
        values = {place.path: place.value[...] for place in matrices.places(model)}
        repeats, blocks = _going(self, config)
        if repeats:
            sets = changes.shape[1]
            kept = jnp.sort(jnp.argsort(-jnp.sum(changes, axis=0))[: sets - repeats])
            values = _of_periods(values, lambda value: value[kept])
            uses = config.repeats // sets
            groups = None if config.groups is None else sets - repeats
            layers = config.layers - repeats * uses * len(config.pattern)
            config = dataclasses.replace(config, layers=layers, groups=groups)
        else:
            stay = _blocks(config, jnp.sum(changes, axis=1), len(config.pattern) - blocks)
            pattern = tuple(config.pattern[i] for i in stay)
            layers = config.layers - blocks * config.repeats
            config = dataclasses.replace(config, layers=layers, pattern=pattern)
            of_stay = {
                (*PERIODS, new, *path[3:]): value
                for new, i in enumerate(stay)
                for path, value in values.items()
                if path[:3] == (*PERIODS, i)
            }
            values = {path: value for path, value in values.items() if path[0] != "periods"} | of_stay
        return Applied(rebuilt(config, values), _outside(model))


@dataclass(frozen=True, kw_only=True)
class TieLayers(Rule):
    """Consecutive repeats of the pattern share the mean of their parameters."""

    reshapes: ClassVar[bool] = True

    uses: int
    """How many of those that have parameters of their own become one."""

    def __post_init__(self):
        super().__post_init__()
        check_whole(self)
        if self.uses < 2:
            raise UserError(f"{self.method}: at least 2 become one; nearest: tie-layers-2")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"tie-layers-{self.uses}"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        check_dense(self, model)
        config = model.config
        sets = config.groups or config.repeats
        if sets % self.uses:
            fits = [n for n in range(2, sets + 1) if sets % n == 0]
            nearest = min(fits, key=lambda n: abs(n - self.uses), default=None)
            said = f"nearest: tie-layers-{nearest}" if nearest else "it has nothing to share"
            raise UserError(f"{self} does not divide the pattern's {sets} repeats with parameters of their own; {said}")
        values = {place.path: place.value[...] for place in matrices.places(model)}
        mean = lambda value: jnp.mean(value.reshape(-1, self.uses, *value.shape[1:]), axis=1)  # noqa: E731
        values = _of_periods(values, mean)
        config = dataclasses.replace(config, groups=sets // self.uses)
        return Applied(rebuilt(config, values), _outside(model))


METHODS = {
    "prune-layers-25%": Method(
        f"prune-layers{AMOUNT}",
        lambda found, only: PruneLayers(amount=Amount(float(found[1]), bool(found[2])), text=bool(found[3]), only=only),
        "25 % (or a number) of the blocks are taken out, those that change random tokens least; with -text a text",
    ),
    "tie-layers-2": Method(
        r"tie-layers-(\d+)",
        lambda found, only: TieLayers(uses=int(found[1]), only=only),
        "every 2 consecutive layers (or any other number) share the mean of their parameters",
    ),
}
"""See `phyla.compression.recipes`."""


def check_whole(recipe: Rule) -> None:
    """Raises UserError if it is for some parameters only."""
    if recipe.only:
        raise UserError(f"{recipe} is for whole blocks; nearest: {recipe.method}")


class Watched(nnx.Module):
    """A block that returns Σ (1 - cos) over its tokens in place of its state."""

    def __init__(self, block: Block):
        self.block = block

    def __call__(self, x: jax.Array, value: Any, state: None, segment_ids: jax.Array | None) -> tuple:
        """See `Block`."""
        y, value, _, routing = self.block(x, value, state, segment_ids)
        norm = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return y, value, jnp.sum(1 - jnp.sum(x * y, axis=-1) / jnp.maximum(norm, 1e-30)), routing


def influence(model: LanguageModel, batches: Iterable[tuple[jax.Array, jax.Array]]) -> Moments:
    """How much each block of the pattern changes the residual stream, float32 [sets of parameters], by its path.

    A learned beginning is left out, as in `calibrate.moments`.

    Args:
        model: stays as it is.
        batches: as of `calibrate.moments`.
    """
    config, model = model.config, nnx.clone(model)
    if model.beginning is not None:
        del model.beginning
    sets = config.groups or config.repeats
    count = len(config.pattern)
    for i in range(count):
        matrices.replace(model, (*PERIODS, i), Watched(model.periods.blocks[i]))
    graphdef, params = nnx.split(model)

    @jax.jit
    def changes(params: nnx.State, tokens: jax.Array, segment_ids: jax.Array) -> list[jax.Array]:
        nothing = ModelState((None,) * len(config.prefix), (None,) * count, start(len(tokens)))
        network: LanguageModel = nnx.merge(graphdef, params)
        state = network.forward(tokens, nothing, segment_ids).state
        assert state is not None
        return [each.reshape(sets, -1).sum(1) for each in state.blocks]

    total = [jnp.zeros(sets)] * count
    for tokens, segment_ids in batches:
        total = jax.tree.map(jnp.add, total, changes(params, tokens, segment_ids))
    return Moments({(*PERIODS, i): each for i, each in enumerate(total)})


def _going(recipe: PruneLayers, config: ModelConfig) -> tuple[int, int]:
    """How many repeats (those that share parameters count as one) go, or how many blocks of the pattern."""
    sets, count = config.groups or config.repeats, len(config.pattern)
    free = config.layers - len(config.prefix)
    repeats = Units(count=sets, of=free).going(recipe.amount)
    if 0 < repeats < sets:
        return repeats, 0
    blocks = Units(count=count, of=free).going(recipe.amount)
    if 0 < blocks < count:
        return 0, blocks
    possible = sorted({n * free // sets for n in range(1, sets)} | {n * free // count for n in range(1, count)})
    if not possible:
        raise UserError(f"{recipe}: the model's one block that is not in the prefix has to stay")
    asked = recipe.amount.value / 100 * free if recipe.amount.share else recipe.amount.value
    nearest = min(possible, key=lambda n: abs(n - asked))
    whole = f"{sets} repeats of {count} blocks" if count > 1 else f"{sets} layers"
    raise UserError(f"{recipe}: {recipe.amount} of {whole} cannot go; nearest: prune-layers-{nearest}")


def _blocks(config: ModelConfig, change: jax.Array, keep: int) -> list[int]:
    """The blocks of the pattern that stay. Where only shapes are computed that is not known: the first."""
    mixers = [block.mixer for block in config.pattern]
    gives = [isinstance(mixer, RWKV7Config) and not mixer.value_residual for mixer in mixers]
    needed = any(isinstance(mixer, RWKV7Config) and mixer.value_residual for mixer in mixers)
    first = [i for i, gives in enumerate(gives) if gives and needed][:1]  # it gives the others their value
    order = range(len(mixers)) if isinstance(change, Tracer) else jnp.argsort(-change).tolist()
    return sorted((first + [i for i in order if i not in first])[:keep])


def _of_periods(values: Arrays, change: Callable[[jax.Array], jax.Array]) -> Arrays:
    """The parameters, with those that repeat changed."""
    stacked = {path: value for path, value in values.items() if path[0] == "periods"}
    return values | jax.jit(lambda stacked: jax.tree.map(change, stacked))(stacked)


def _vocabulary(config: ModelConfig) -> int:
    assert config.vocab_size is not None
    return config.vocab_size


def _outside(model: LanguageModel) -> dict[str, str]:
    """What does not repeat."""
    return {place.name: "not of a repeated layer" for place in matrices.places(model) if place.path[0] != "periods"}
