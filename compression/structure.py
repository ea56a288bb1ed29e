"""Heads, neurons, experts, channels and state dimensions are taken out: a smaller model of the same kind.

Of every layer of a stack as many go, each layer choosing its own. Which are least important follows from the weights
alone, or from a text, which also tells how what remains can make good what is lost: each matrix that reads the units is
fitted to what it gave before, by least squares on the second moments of its inputs (of all weights at once that is the
step of optimal brain surgery, Hassibi and Stork 1993). All layers are judged by one reading, of the model as it was.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.compression import matrices
from phyla.compression.calibrate import Moments, Path
from phyla.compression.parts import Arrays, importance, without
from phyla.compression.rule import Applied, Method, Rule
from phyla.compression.state import is_held
from phyla.compression.units import UNITS, Amount, Units
from phyla.models import sizes
from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Shrink(Rule):
    """What all recipes have in common that say how much of something goes."""

    reshapes: ClassVar[bool] = True

    what: str
    """A name of `phyla.compression.units.UNITS`, or layers."""
    amount: Amount
    text: bool = False
    """Whether a text tells what is least important."""

    def __post_init__(self):
        super().__post_init__()
        value, share = self.amount.value, self.amount.share
        if share and not 0 < value < 100:
            raise UserError(f"{self.method}: more than 0 and less than 100 % can go; nearest: prune-{self.what}-50%")
        if not share and (value < 1 or value % 1):
            nearest = max(1, round(value))
            raise UserError(
                f"{self.method}: a whole number goes, or a share in %; nearest: prune-{self.what}-{nearest}"
            )

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"prune-{self.what}-{self.amount}" + "-text" * self.text

    @property
    def needs_text(self) -> bool:
        """See `Rule.needs_text`."""
        return self.text


@dataclass(frozen=True, kw_only=True)
class PruneUnits(Shrink):
    """Takes out units of layers."""

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        check_dense(self, model)
        sites, reasons = _sites(self, model.config, [place.path for place in chosen])
        values = {place.path: place.value[...] for place in matrices.places(model)}

        @jax.jit
        def smaller(values: Arrays, moments: Arrays) -> Arrays:
            kept, found = _kept(sites, values, moments), {}
            for site in sites:
                for units in site.units:
                    found |= without(site.path, units, kept[site.path, units], values, moments)
            return found

        cut = smaller(values, dict(moments))
        config = _with_layers(model.config, {site.path: site.smaller for site in sites})
        left = dict.fromkeys(values.keys() - cut.keys(), f"{self} is not for it")
        left |= {place.path: f"it has no {self.what}" for place in chosen if place.path in left}
        left |= {path: why for at, why in reasons.items() for path in left if path[: len(at)] == at}
        return Applied(rebuilt(config, values | cut), {matrices.dotted(path): why for path, why in left.items()})


def _named(what: str) -> Callable[[re.Match, str], Rule]:
    def make(found: re.Match, only: str) -> Rule:
        return PruneUnits(what=what, amount=Amount(float(found[1]), bool(found[2])), text=bool(found[3]), only=only)

    return make


AMOUNT = r"-(\d+(?:\.\d+)?)(%?)(-text)?"


def _method(what: str, summary: str) -> Method:
    return Method(f"prune-{what}{AMOUNT}", _named(what), summary)


METHODS = {
    "prune-heads-25%": _method(
        "heads", "25 % (or a number) of the heads of each layer are taken out; with -text the least that a text needs"
    ),
    "prune-neurons-25%": _method("neurons", "the same of the hidden neurons of channel mixers and experts"),
    "prune-experts-50%": _method("experts", "the same of a mixture's experts; with -text those that are used least"),
    "prune-channels-25%": _method("channels", "the same of the inner channels of Mamba-1 and RWKV-4"),
    "prune-states-50%": _method("states", "the same of the state's size in Mamba-1 and Mamba-2"),
}
"""See `phyla.compression.recipes`."""


def check_dense(recipe: Rule, model: LanguageModel) -> None:
    """Raises UserError if a parameter is no array any more."""
    held = matrices.weights(model).keys() - {place.path for place in matrices.places(model)}
    if held:
        name = min(map(matrices.dotted, held))
        raise UserError(f"{recipe} takes parts of arrays, and {name} is none any more: put it before what made it so")
    if is_held(model):
        raise UserError(f"{recipe} makes a model whose state is floats: put it before state-int8")


def rebuilt(config: ModelConfig, values: Arrays) -> LanguageModel:
    """A model with these parameters."""
    graphdef, params = nnx.split(sizes.abstract(config))
    for path, variable in nnx.to_flat_state(params):
        assert values[path].shape == variable.shape, (matrices.dotted(path), values[path].shape, variable.shape)
        variable.set_value(values[path])
    return nnx.merge(graphdef, params)


class Site(NamedTuple):
    """A layer that shrinks."""

    path: Path
    units: tuple[Units, ...]
    keep: int
    """Of each bucket of the first units; as many go of each bucket of the others."""

    @property
    def smaller(self) -> LayerConfig:
        """What becomes of it."""
        assert self.units[0].smaller is not None
        return self.units[0].smaller(self.keep * self.units[0].buckets)


def _sites(recipe: PruneUnits, config: ModelConfig, chosen: list[Path]) -> tuple[list[Site], dict[Path, str]]:
    """The layers that shrink, and why others that could have such units do not."""
    sites, tied, never, reasons = [], {}, {}, {}
    for path, layer in layers(config):
        find = UNITS[recipe.what].get(type(layer))
        if find is None:
            continue
        found, wanted = find(layer, config, recipe.amount), any(each[: len(path)] == path for each in chosen)
        if isinstance(found, str):
            never |= {path: found} if wanted else {}
            continue
        if found[0].tied:
            tied[path] = wanted
        going = found[0].going(recipe.amount)
        keep = found[0].count // found[0].buckets - going
        if wanted and going > 0 and keep > 0:
            sites.append(Site(path, found, keep))
        elif wanted:
            reasons[path] = f"{recipe.amount} of {_said(recipe, found[0])}"
    reasons |= never
    if not sites:
        _refuse(recipe, config, reasons)
    if len(set(tied.values())) > 1:
        raise UserError(f"{recipe}: blocks that share a value lose the same heads; nearest: {recipe.method}")
    return sites, reasons


def _said(recipe: PruneUnits, units: Units) -> str:
    """That an amount does not go, and the nearest that does."""
    of = f"{units.of or units.count} {recipe.what}" + f", alike in {units.buckets} groups," * (units.buckets > 1)
    each = units.count // units.buckets
    possible = [n * (units.of or units.count) // each for n in range(1, each)]
    if not possible:
        return f"{of} cannot go"
    asked = recipe.amount.value * ((units.of or units.count) / 100 if recipe.amount.share else 1)
    return f"{of} cannot go; nearest: prune-{recipe.what}-{min(possible, key=lambda n: abs(n - asked))}"


def _refuse(recipe: PruneUnits, config: ModelConfig, reasons: dict[Path, str]) -> None:
    if reasons:
        path, why = next(iter(reasons.items()))
        why = f"{matrices.dotted(path)}: {why}"
    elif any(type(layer) in UNITS[recipe.what] for _, layer in layers(config)):
        why = f"'{recipe.only}' is in no path of a layer with {recipe.what}"
    else:
        why = f"it has no {recipe.what}"
    raise UserError(f"{recipe} changes nothing in this model: {why}; {_fitting(config)}")


def _fitting(config: ModelConfig) -> str:
    half = Amount(50, True)
    fits = [
        f"prune-{what}-50%"
        for what, kinds in UNITS.items()
        if any(type(layer) in kinds and _some(kinds[type(layer)](layer, config, half)) for _, layer in layers(config))
    ]
    return f"what fits: {', '.join([*fits, 'prune-layers-50%'])}"


def _some(found: tuple[Units, ...] | str) -> bool:
    return not isinstance(found, str) and found[0].count > found[0].buckets


def layers(config: ModelConfig) -> Iterator[tuple[Path, LayerConfig]]:
    """Every mixer and channel mixer of the configuration, by its path in the model."""
    for at, blocks in ((("prefix",), config.prefix), (("periods", "blocks"), config.pattern)):
        for i, block in enumerate(blocks):
            for part in ("mixer", "channel"):
                layer = getattr(block, part)
                if layer is not None:
                    yield (*at, i, part), layer


def _with_layers(config: ModelConfig, layers: dict[Path, LayerConfig]) -> ModelConfig:
    def replaced(at: Path, blocks: tuple[BlockConfig, ...]) -> tuple[BlockConfig, ...]:
        found = []
        for i, block in enumerate(blocks):
            parts = {part: layers.get((*at, i, part), getattr(block, part)) for part in ("mixer", "channel")}
            found.append(dataclasses.replace(block, **parts))
        return tuple(found)

    prefix, pattern = replaced(("prefix",), config.prefix), replaced(("periods", "blocks"), config.pattern)
    return dataclasses.replace(config, prefix=prefix, pattern=pattern)


def _kept(sites: list[Site], values: Arrays, moments: Arrays) -> dict[tuple[Path, Units], jax.Array]:
    """The units that stay, in their order, integers [..., n] for each layer of a stack."""
    found, tied = {}, {}
    for site in sites:
        for units in site.units:
            going = site.units[0].count // site.units[0].buckets - site.keep
            keep = units.count // units.buckets - going
            scores = importance(site.path, units, values, moments)
            if units.tied:
                tied[site.path, units] = keep, scores
            else:
                found[site.path, units] = _largest(scores, keep, units.buckets)
    if tied:
        total = jnp.sum(jnp.concatenate([s.reshape(-1, s.shape[-1]) for _, s in tied.values()]), axis=0)
        for (path, units), (keep, scores) in tied.items():
            same = _largest(total, keep, units.buckets)
            found[path, units] = jnp.broadcast_to(same, (*scores.shape[:-1], *same.shape))
    return found


def _largest(scores: jax.Array, keep: int, buckets: int) -> jax.Array:
    *lead, count = scores.shape
    by_bucket = scores.reshape(*lead, buckets, count // buckets)
    kept = jnp.sort(jnp.argsort(-by_bucket, axis=-1)[..., :keep], axis=-1)
    return (kept + jnp.arange(buckets)[:, None] * (count // buckets)).reshape(*lead, buckets * keep)
