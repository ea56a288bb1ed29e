"""Before training: every matrix, and every table of the vocabulary, is rounded whenever it is used; see `models.fake`.

After it, the method that rounds (`qat-int4` by `int4`) makes of the model the `Quantized` of the same values.
"""

import functools
import math
import re
from dataclasses import dataclass, replace

import jax
from flax import nnx

from phyla.compression import matrices, quantize
from phyla.compression.calibrate import Moments, each
from phyla.compression.quantize import Quantize, inputs_first, nearest, refusal
from phyla.compression.rule import Applied, Method, Rule
from phyla.kernels.quantized_matmul import Format, Int8
from phyla.kernels.quantized_matmul.packing import unit
from phyla.models.fake import FakeQuantized, LearnedSteps, first_steps
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import parameter


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a matrix [K, N] is rounded to nearest: a function that equals another of the same recipe."""

    recipe: Quantize
    dynamic: bool = False
    """What it multiplies is rounded too, a scale for each token."""

    def __call__(self, w: jax.Array) -> Format:
        """See above."""
        held = nearest(self.recipe, w)
        if not self.dynamic:
            return held
        assert isinstance(held, Int8)
        return replace(held, dynamic=True)


@dataclass(frozen=True, kw_only=True)
class QAT(Rule):
    """Rounds at every use what training changes."""

    rounding: Quantize
    activations: bool = False
    """Also what matrices multiply, as `w8a8` does."""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "qat-w8a8" if self.activations else f"qat-{self.rounding.method}"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left = {}
        for place in chosen:
            if why := _refusal(place, self.rounding):
                left[place.name] = why
                continue
            rounding = Rounding(recipe=self.rounding, dynamic=self.activations and place.kind == "matrix")
            fake = FakeQuantized(place.value, rounding, transposed=inputs_first(place)[2])
            matrices.replace(model, place.path, fake)
        return Applied(model, left)


@dataclass(frozen=True, kw_only=True)
class LSQ(Rule):
    """Rounds to integers at every use, with steps that are trained too."""

    bits: int
    group: int | None = None
    """Inputs that share a step; None: all of an output channel."""
    tensor: bool = False
    """One step for the whole matrix, as in the paper."""

    def __post_init__(self):
        super().__post_init__()
        self._alike()  # refuses the same

    def _alike(self) -> Quantize:
        return quantize.named(f"int{self.bits}{self._scales()}")

    def _scales(self) -> str:
        return "-tensor" if self.tensor else f"-g{self.group}" if self.group is not None else ""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"lsq-int{self.bits}{self._scales()}"

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left, rows = {}, unit(self.bits)
        for place in chosen:
            if why := _refusal(place, self._alike()):
                left[place.name] = why
                continue
            w, axes, turned = inputs_first(place)
            K = w.shape[-2]
            group = self.group or K + -K % rows
            first = _first_steps(w, self.bits, None if self.tensor else group)
            own = axes[:-2] + (() if self.tensor else axes[-2:])
            # Adam does not see how large a gradient is. Steps are smaller than weights by about √most: so they move as
            # fast for their size.
            rate = 1 / math.sqrt((1 << self.bits - 1) - 1)
            step = parameter(lambda *_, first=first: first, first.shape, own, nnx.Rngs(0), learning_rate=rate)
            place.value.set_metadata(precise=KEPT)
            fake = LearnedSteps(place.value, step, bits=self.bits, group=group, transposed=turned)
            matrices.replace(model, place.path, fake)
        return Applied(model, left)


KEPT = "its steps are learned: fix-qat rounds it by them"
NOT_TRAINED_SO = "not trained to be rounded"


@dataclass(frozen=True, kw_only=True)
class FixQAT(Rule):
    """Rounds once and for all what was trained to be rounded, exactly as it was in training."""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "fix-qat"

    def chooses(self, place: matrices.Place) -> bool:
        """See `Rule.chooses`."""
        return (place.kind is not None or place.left == KEPT) and re.search(self.only, place.name) is not None

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`."""
        left = {}
        for place in chosen:
            fake = matrices.holder(model, place.path)
            if not isinstance(fake, FakeQuantized):
                left[place.name] = NOT_TRAINED_SO
                continue
            *stack, rows, columns = place.axes
            axes = (*stack, columns, rows) if fake.transposed else place.axes
            matrices.replace(model, place.path, Quantized(_held(fake), axes, transposed=fake.transposed))
        return Applied(model, left)


def _refusal(place: matrices.Place, alike: Quantize) -> str:
    return "packed already: this is for before" if place.kind == "values" else refusal(place, alike)


@jax.jit(static_argnums=(1, 2))
def _first_steps(w: jax.Array, bits: int, group: int | None) -> jax.Array:
    return each(functools.partial(first_steps, bits=bits, group=group), w)


@jax.jit
def _held(fake: FakeQuantized) -> Format:
    return fake.held()


def _qat(found: re.Match, only: str) -> QAT:
    return QAT(rounding=quantize.named(found[1]), only=only)


def _lsq(found: re.Match, only: str) -> LSQ:
    group = None if found[2] is None else int(found[2].removeprefix("-g"))
    return LSQ(bits=int(found[1]), group=group, tensor=found[0].endswith("-tensor"), only=only)


NEAREST = "|".join(method.pattern for name, method in quantize.METHODS.items() if not name.startswith("gptq"))
METHODS = {
    "qat-int4": Method(
        f"qat-({NEAREST})",
        _qat,
        "before training: int4 (or another that rounds to nearest: int8-g64, nf4, ternary) at every use",
    ),
    "qat-w8a8": Method(
        "qat-w8a8",
        lambda _, only: QAT(rounding=Quantize(format="int8"), activations=True, only=only),
        "before training: w8a8 at every use",
    ),
    "lsq-int4": Method(
        r"lsq-int([2348])(-g\d+)?(?:-tensor)?",
        _lsq,
        "before training: integers at every use, with steps that are learned (LSQ)",
    ),
    "fix-qat": Method(
        "fix-qat",
        lambda _, only: FixQAT(only=only),
        "after training with qat-… or lsq-…: rounds once and for all, as in training",
    ),
}
"""See `phyla.compression.recipes`."""
