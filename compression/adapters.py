"""Recipes that freeze a model and learn a little beside its matrices.

What they are for: every matrix but heads and those that compression leaves too (`precise`), or whatever matrices and
tables `@REGEX` finds in a path, dense or of few bits. What they learn begins such that the model's answers do not
change.
"""

import abc
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.compression import matrices
from phyla.compression.calibrate import Moments
from phyla.compression.rule import Applied, Method, Rule
from phyla.models import sizes
from phyla.models.adapted import IA3, Adapter, Bottleneck, DoRA, LoRA, PiSSA
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.weights import Weight, constant, freeze, materialize, parameter, uniform

PART = "an adapter is on it, or it is part of one: merge it first"

OUTPUTS = r"mixer\.(k|v|key|value|in_proj|x_proj|z)\.weight$"
"""IA3's keys and values. A Mamba's values are half of in_proj's outputs, its keys (B) part of x_proj's."""
INPUTS = r"channel\.(.*\.)?(down|value)\.weight$"
"""IA3's maps back from the hidden layer of a channel mixer; an RWKV's is called value."""


class Target(NamedTuple):
    """What an adapter may wrap: a matrix or a table, in whatever form."""

    path: tuple[Any, ...]
    held: nnx.Param | Weight
    axes: tuple[str, ...]
    usual: bool
    """Whether it is wrapped if nothing is said."""
    returns: bool
    """Whether a block's mixer or channel mixer gives its output to the residual stream."""

    @property
    def name(self) -> str:
        """With dots."""
        return matrices.dotted(self.path)

    @property
    def stack(self) -> tuple[int, ...]:
        """The dimensions over which it is stacked."""
        return self.held.shape[:-2]

    def parameter(
        self, init: Callable, shape: tuple[int, ...], axes: tuple[str, ...], key: jax.Array, *, matrix: bool = False
    ) -> nnx.Param:
        """One that is learned for it, stacked as it is: nothing decays it, since 0 need not be where it began."""
        stack, named = self.stack, self.axes[: len(self.stack)]
        return parameter(init, (*stack, *shape), (*named, *axes), nnx.Rngs(params=key), matrix=matrix, precise=PART)


def targets(model: LanguageModel) -> list[Target]:
    """Of a model, by what the dense one says of itself."""
    dense = {place.path: place for place in matrices.places(sizes.abstract(model.config))}
    return list(_targets(matrices.weights(model), dense))


def _targets(held: dict[tuple, nnx.Param | Weight], dense: dict[tuple, matrices.Place]) -> Iterator[Target]:
    for path, each in held.items():
        place = dense.get(path)
        if place is None or not (place.kind or place.value.get_metadata()["matrix"]):
            continue
        usual = place.kind == "matrix"
        yield Target(path, each, place.axes, usual, usual and place.axes[-1] == "embed" and _in_block(path))


def _in_block(path: tuple) -> bool:
    return "mixer" in path or "channel" in path


@dataclass(frozen=True, kw_only=True)
class Adapt(Rule):
    """Wraps matrices."""

    keeps_base: ClassVar[bool] = True

    def fits(self, target: Target) -> bool:
        """Whether it is for a target; `only` instead, if that is given."""
        return target.usual

    def refusal(self, target: Target) -> str:
        """Why a target that it is for stays as it is; empty: it does not."""
        return ""

    @abc.abstractmethod
    def wrap(self, target: Target, key: jax.Array) -> Adapter:
        """What stands in its place."""

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Rule.apply`. Raises UserError if `only` finds nothing."""
        able = targets(model)
        found = [each for each in able if (re.search(self.only, each.name) if self.only else self.fits(each))]
        left = {place.name: f"{self.method} is not for it" for place in chosen}
        left |= {target.name: why for target in found if (why := self.refusal(target))}
        wrapped = [target for target in found if not self.refusal(target)]
        if not wrapped:
            raise UserError(f"{self} is for nothing in this model: {self._reason(able, found)}")
        freeze(model)
        for target, own in zip(wrapped, jax.random.split(key, len(wrapped)), strict=True):
            for _, variable in _flat(target.held):
                variable.set_metadata(precise=PART)
            matrices.replace(model, target.path, self.wrap(target, own))
        return Applied(model, left, tuple(target.name for target in wrapped))

    def _reason(self, able: list[Target], found: list[Target]) -> str:
        if found:
            return f"{found[0].name} stays as it is ({self.refusal(found[0])})"
        names = [target.name for target in able]
        if not self.only:
            return f"it has no such matrices; name some, as in {self.method}@{names[-1]}"
        nearest = difflib.get_close_matches(self.only, names, n=1, cutoff=0.0)[0]
        return f"'{self.only}' is in no path of a matrix; nearest: {nearest}"


@dataclass(frozen=True, kw_only=True)
class LowRank(Adapt):
    """W + α/r · A B, and its kin. A begins as in PEFT: PyTorch's default for linear maps, ±1/√in; B as zero."""

    kind: Literal["lora", "rslora", "dora", "pissa"]
    rank: int
    alpha: float = 8.0
    """α, PEFT's default."""

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"{self.method}: the rank must be at least 1; nearest: {self.kind}-r1")
        if not self.alpha > 0:
            raise UserError(f"{self.method}: α must be positive; nearest: {self.kind}-r{self.rank}-a8")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"{self.kind}-r{self.rank}" + (f"-a{self.alpha:g}" if self.alpha != 8 else "")

    @property
    def scale(self) -> float:
        """Of A B: α/r; rank-stabilised α/√r (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)

    def refusal(self, target: Target) -> str:
        """See `Adapt.refusal`."""
        K, N = target.held.shape[-2:]
        if self.rank * (K + N) >= K * N:
            return f"of {K} × {N}: A and B of rank {self.rank} would be as large"
        return ""

    def wrap(self, target: Target, key: jax.Array) -> Adapter:
        """See `Adapt.wrap`."""
        held, (K, N), (above, below) = target.held, target.held.shape[-2:], target.axes[-2:]
        begin_A, begin_B = uniform(K**-0.5), constant(0.0)
        if self.kind == "pissa":
            first, second = of_each(lambda w: principal(w, self.rank, self.scale), held)
            begin_A, begin_B = lambda *_: first, lambda *_: second
        A = target.parameter(begin_A, (K, self.rank), (above, "rank"), key, matrix=True)
        B = target.parameter(begin_B, (self.rank, N), ("rank", below), key, matrix=True)
        match self.kind:
            case "pissa":
                return PiSSA(held, A, B, self.scale)
            case "dora":
                norm = of_each(lambda w: jnp.linalg.norm(w, axis=0), held)
                magnitude = target.parameter(lambda *_: jnp.array(norm), (N,), (below,), key)
                return DoRA(held, A, B, self.scale, magnitude, norm)
            case _:
                return LoRA(held, A, B, self.scale)


@dataclass(frozen=True, kw_only=True)
class Rescale(Adapt):
    """Learned scales of keys and values, and of the hidden layer of channel mixers (IA3)."""

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return "ia3"

    def fits(self, target: Target) -> bool:
        """See `Adapt.fits`."""
        return re.search(f"{OUTPUTS}|{INPUTS}", target.name) is not None

    def wrap(self, target: Target, key: jax.Array) -> Adapter:
        """See `Adapt.wrap`."""
        inputs = re.search(INPUTS, target.name) is not None
        side = -2 if inputs else -1
        factor = target.parameter(constant(1.0), (target.held.shape[side],), (target.axes[side],), key)
        return IA3(target.held, factor, inputs=inputs)


@dataclass(frozen=True, kw_only=True)
class Insert(Adapt):
    """Bottlenecks behind what blocks add to the residual stream.

    Behind mixers and channel mixers (Houlsby et al. 2019), or behind channel mixers alone (Pfeiffer et al. 2021, arXiv
    2005.00247), or mixers where a block has no channel mixer. Activations as in AdapterHub; no biases.
    """

    kind: Literal["houlsby", "pfeiffer"]
    rank: int

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"{self.method}: a bottleneck is at least 1 wide; nearest: {self.kind}-1")

    @property
    def method(self) -> str:
        """See `Rule.method`."""
        return f"{self.kind}-{self.rank}"

    def fits(self, target: Target) -> bool:
        """See `Adapt.fits`."""
        return target.returns

    def apply(self, model: LanguageModel, chosen: list[matrices.Place], moments: Moments, key: jax.Array) -> Applied:
        """See `Adapt.apply`."""
        if self.kind == "pfeiffer" and not self.only:
            behind = [target.path for target in targets(model) if target.returns]
            with_channel = {path[: path.index("channel")] for path in behind if "channel" in path}
            last = [path for path in behind if "channel" in path or path[: path.index("mixer")] not in with_channel]
            only = "|".join(f"^{re.escape(matrices.dotted(path))}$" for path in last)
            return dataclasses.replace(self, only=only).apply(model, chosen, moments, key)
        return super().apply(model, chosen, moments, key)

    def wrap(self, target: Target, key: jax.Array) -> Adapter:
        """See `Adapt.wrap`."""
        N, axis = target.held.shape[-1], target.axes[-1]
        down = target.parameter(uniform(N**-0.5), (N, self.rank), (axis, "rank"), key, matrix=True)
        up = target.parameter(constant(0.0), (self.rank, N), ("rank", axis), key, matrix=True)
        return Bottleneck(target.held, down, up, jax.nn.silu if self.kind == "houlsby" else jax.nn.relu)


def _flat(held: nnx.Param | Weight) -> list[tuple[tuple, nnx.Param]]:
    return [((), held)] if isinstance(held, nnx.Param) else list(nnx.to_flat_state(nnx.state(held, nnx.Param)))


def of_each(one: Callable[[jax.Array], Any], held: nnx.Param | Weight) -> Any:
    """`one` of every matrix [in, out] of a stack, one after another: no more than one is dense at a time."""

    def of_matrix(held: nnx.Param | Weight) -> Any:
        return one(materialize(held))

    def of_stack(held: nnx.Param | Weight, depth: int) -> Any:
        return of_matrix(held) if depth == 0 else jax.lax.map(lambda each: of_stack(each, depth - 1), held)

    return jax.jit(of_stack, static_argnums=1)(held, len(held.shape) - 2)


def principal(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """A [in, r] and B [r, out] with scale · A B the best matrix of that rank; each has √(σ / scale) of it."""
    U, S, V = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scale)
    return U[:, :rank] * root, root[:, None] * V[:rank]


def _low_rank(kind: Literal["lora", "rslora", "dora", "pissa"], summary: str) -> dict[str, Method]:
    def make(found: re.Match, only: str) -> Rule:
        alpha = {} if found[2] is None else {"alpha": float(found[2])}
        return LowRank(kind=kind, rank=int(found[1]), only=only, **alpha)

    return {f"{kind}-r8": Method(rf"{kind}-r(\d+)(?:-a(\d+(?:\.\d+)?))?", make, summary)}


def _insert(kind: Literal["houlsby", "pfeiffer"], summary: str) -> dict[str, Method]:
    make = lambda found, only: Insert(kind=kind, rank=int(found[1]), only=only)  # noqa: E731
    return {f"{kind}-64": Method(rf"{kind}-(\d+)", make, summary)}


METHODS = {
    **_low_rank(
        "lora", "trains W + α/r A B beside a frozen W, of rank r; α is 8, or 16 in lora-r8-a16 (phyla finetune)"
    ),
    **_low_rank("rslora", "the same with α/√r"),
    **_low_rank("dora", "the same with a learned magnitude of each column"),
    **_low_rank("pissa", "LoRA that begins with the largest singular directions of W"),
    "ia3": Method("ia3", lambda _, only: Rescale(only=only), "trains scales of keys, values and hidden layers"),
    **_insert("houlsby", "trains bottlenecks of 64 behind mixers and channel mixers"),
    **_insert("pfeiffer", "the same behind channel mixers alone"),
}
"""See `phyla.compression.recipes`."""
