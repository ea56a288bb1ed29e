"""What a layer consists of: for each kind the units that can be taken out, and the entries of its parameters they have.

The one place that knows layers by their parameters' names. That it names all of them is checked wherever it is used:
what remains must have the shapes of a model that is built so.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6ChannelConfig, RWKV6Config
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.moe import MoEConfig


class Fixed(NamedTuple):
    """A section of a dimension that belongs to no unit."""

    width: int


Section = int | Fixed
"""So many entries for each unit, one unit after another; or none's."""


class Cut(NamedTuple):
    """A dimension of a parameter, as sections."""

    parameter: str
    axis: int
    """From the end: that of one layer's parameter, however it is stacked."""
    sections: tuple[Section, ...]


class Piece(NamedTuple):
    """One section of a cut."""

    parameter: str
    axis: int
    section: int = 0


class Norm(NamedTuple):
    """A root mean square over the units (of a bucket), which is over fewer once some are gone."""

    scale: str
    energy: Piece
    """The matrix that writes what is normalised: from its columns follows each unit's part of the sum of squares."""
    reader: str = ""
    """The matrix that reads the result, if there is one."""


@dataclass(frozen=True)
class Amount:
    """How many go."""

    value: float
    share: bool
    """Percent of the units; else a number of them."""

    def __str__(self) -> str:
        return f"{self.value:g}" + "%" * self.share


@dataclass(frozen=True, kw_only=True)
class Units:
    """Those of one layer."""

    count: int
    cuts: tuple[Cut, ...] = ()
    """A parameter that the layer has not (a bias) is passed over."""
    judged: tuple[Piece, ...] = ()
    """Where a unit with zeros adds nothing: its importance is the product of the norms. The last, if a matrix reads
    the units, says with moments of a text exactly how much each adds."""
    smaller: Callable[[int], LayerConfig] | None = None
    """The layer's configuration with so many; None: the layer's first `Units` says it."""
    buckets: int = 1
    """As many go of each of so many equal runs of units."""
    of: int | None = None
    """Of how many an amount speaks, if not of this count: heads, where a unit is a group of them."""
    stack: int = 0
    """Dimensions before a layer's matrices of which each entry has units of its own (experts)."""
    norms: tuple[Norm, ...] = ()
    used: str = ""
    """The matrix of which each unit has one, so that the moments say how much it is used."""
    tied: bool = False
    """The same units must go in all layers."""

    def going(self, amount: Amount) -> int:
        """How many of each bucket; 0 if that is no whole number."""
        if amount.share:
            return round(amount.value / 100 * self.count / self.buckets)
        going, rest = divmod(amount.value * self.count, (self.of or self.count) * self.buckets)
        return 0 if rest else int(going)


Found = tuple[Units, ...] | str
"""The units of a layer, or why there are none."""


def _linear(*names: str, axis: int = -1, each: int = 1) -> tuple[Cut, ...]:
    """Cuts of whole dimensions, and of the biases that follow them."""
    cuts = tuple(Cut(f"{name}.weight", axis, (each,)) for name in names)
    return cuts + (tuple(Cut(f"{name}.bias", -1, (each,)) for name in names) if axis == -1 else ())


def _vectors(*names: str, each: int = 1) -> tuple[Cut, ...]:
    return tuple(Cut(name, -1, (each,)) for name in names)


def _attention_heads(config: AttentionConfig, model: ModelConfig, amount: Amount) -> Found:
    if config.positions == "alibi":
        return "ALiBi's slopes are by the number of the head"
    H, kv = config.resolved_head_dim(model), config.kv_heads or config.heads
    group = config.heads // kv  # query heads of a key head

    def smaller(n: int) -> LayerConfig:
        kv_heads = None if config.kv_heads is None else n
        return dataclasses.replace(config, heads=n * group, kv_heads=kv_heads, head_dim=H)

    cuts = _linear("q", each=group * H) + _linear("k", "v", each=H) + _linear("o", axis=-2, each=group * H)
    judged = (Piece("v.weight", -1), Piece("o.weight", -2))
    whole = Units(count=kv, of=config.heads, cuts=cuts, judged=judged, smaller=smaller)
    cuts = _linear("q", each=H) + _linear("o", axis=-2, each=H)
    fewer = lambda n: dataclasses.replace(config, heads=n, head_dim=H)  # noqa: E731
    alike = Units(count=config.heads, buckets=kv, cuts=cuts, judged=judged[1:], smaller=fewer)
    # Key heads with all their query heads, where the amount is a number of them; else as many of each one's.
    exact = amount.value * kv % (100 if amount.share else config.heads) == 0
    return (whole if group == 1 or (exact and whole.going(amount) < kv) or not alike.going(amount) else alike,)


def _mlstm_heads(config: MLSTMConfig, model: ModelConfig, amount: Amount) -> Found:
    H, D = config.heads, model.width
    qk, v = config.qk_width(model) // H, config.v_width(model) // H

    def smaller(n: int) -> LayerConfig:
        return dataclasses.replace(config, heads=n, qk_expand=n * qk / D, v_expand=n * v / D)

    cuts = _linear("q", "k", each=qk) + _linear("v", "o_gate", each=v) + _linear("out", axis=-2, each=v)
    cuts += _linear("i_gate", "f_gate") + _vectors("i_bias", "f_bias") + _vectors("norm.scale", each=v)
    judged = (Piece("norm.scale", -1), Piece("out.weight", -2))
    return (Units(count=H, cuts=cuts, judged=judged, smaller=smaller),)


def _mlstm_block_heads(config: MLSTMBlockConfig, model: ModelConfig, amount: Amount) -> Found:
    P, p = config.inner(model) // config.heads, config.projection
    if P % p:
        return f"its maps mix {p} channels, and heads of {P} share some"

    def smaller(n: int) -> LayerConfig:
        return dataclasses.replace(config, heads=n, expand=n * P / model.width, round_to=1)

    cuts = (Cut("up.weight", -1, (P, P)), Cut("up.bias", -1, (P, P)), Cut("conv_weight", -1, (P,)))
    cuts += _vectors("conv_bias", "norm.scale", "skip", "q.bias", "k.bias", "v.bias", each=P)
    cuts += tuple(Cut(f"{name}.weight", -3, (P // p,)) for name in "qkv") + _linear("down", axis=-2, each=P)
    for gate in ("i", "f"):
        cuts += (Cut(f"{gate}_gate.weight", -2, (P, P, P)), *_linear(f"{gate}_gate"), *_vectors(f"{gate}_bias"))
    judged = (Piece("up.weight", -1, 1), Piece("down.weight", -2))
    return (Units(count=config.heads, cuts=cuts, judged=judged, smaller=smaller),)


def _slstm_heads(config: SLSTMConfig, model: ModelConfig, amount: Amount) -> Found:
    return "each of its heads is a part of the residual stream"


def _rwkv6_heads(config: RWKV6Config, model: ModelConfig, amount: Amount) -> Found:
    K = config.head_dim
    cuts = _linear("receptance", "key", "value", "gate", "decay_up", each=K) + _linear("output", axis=-2, each=K)
    cuts += _vectors("time_decay", "time_first", "norm_scale", "norm_bias", each=K)
    judged = (Piece("gate.weight", -1), Piece("output.weight", -2))
    smaller = lambda n: dataclasses.replace(config, heads=n)  # noqa: E731
    return (Units(count=config.inner(model) // K, cuts=cuts, judged=judged, smaller=smaller),)


def _rwkv7_heads(config: RWKV7Config, model: ModelConfig, amount: Amount) -> Found:
    K = config.head_dim
    cuts = _linear("receptance", "key", "value", "w.up", "a.up", "g.up", "v.up", each=K)
    cuts += _linear("output", axis=-2, each=K)
    cuts += _vectors("w0", "a0", "v0", "k_k", "k_a", "r_k", "norm_scale", "norm_bias", each=K)
    judged = (Piece("g.up.weight", -1), Piece("output.weight", -2))
    smaller = lambda n: dataclasses.replace(config, heads=n)  # noqa: E731
    # A value residual mixes a channel with the same channel of the first block's values.
    tied = any(getattr(block.mixer, "value_residual", False) for block in model.blocks)
    return (Units(count=config.inner(model) // K, cuts=cuts, judged=judged, smaller=smaller, tied=tied),)


def _mamba2_heads(config: Mamba2Config, model: ModelConfig, amount: Amount) -> Found:
    P, H, G = config.head_dim, config.heads(model), config.groups
    shared = Fixed(2 * G * config.state)
    cuts = tuple(Cut(f"in_proj.{name}", -1, (P, P, shared, 1)) for name in ("weight", "bias"))
    cuts += tuple(Cut(f"conv_{name}", -1, (P, shared)) for name in ("weight", "bias"))
    cuts += _vectors("dt_bias", "A_log", "D") + _vectors("norm.scale", each=P) + _linear("out_proj", axis=-2, each=P)
    judged = (Piece("in_proj.weight", -1, 0), Piece("in_proj.weight", -1, 1), Piece("out_proj.weight", -2))
    norm = Norm("norm.scale", energy=Piece("in_proj.weight", -1, 1), reader="out_proj.weight")
    smaller = lambda n: dataclasses.replace(config, expand=n * P / model.width)  # noqa: E731
    return (Units(count=H, buckets=G, cuts=cuts, judged=judged, smaller=smaller, norms=(norm,)),)


def _mamba3_heads(config: Mamba3Config, model: ModelConfig, amount: Amount) -> Found:
    P, H, G = config.head_dim, config.heads(model), config.groups
    cuts = (Cut("in_proj.weight", -1, (P, P, Fixed(2 * G * config.state), 1, 1, 1, Fixed(config.angles()))),)
    cuts += (Cut("B_bias", -2, (1,)), Cut("C_bias", -2, (1,)))
    cuts += _vectors("dt_bias", "D") + _linear("out_proj", axis=-2, each=P)
    judged = (Piece("in_proj.weight", -1, 0), Piece("in_proj.weight", -1, 1), Piece("out_proj.weight", -2))
    smaller = lambda n: dataclasses.replace(config, expand=n * P / model.width)  # noqa: E731
    return (Units(count=H, buckets=G, cuts=cuts, judged=judged, smaller=smaller),)


def _mamba_channels(config: MambaConfig, model: ModelConfig, amount: Amount) -> Found:
    cuts = (Cut("in_proj.weight", -1, (1, 1)), Cut("in_proj.bias", -1, (1, 1)), Cut("conv_weight", -1, (1,)))
    cuts += _linear("x_proj", "out_proj", axis=-2) + _linear("dt_proj")
    cuts += (*_vectors("conv_bias", "dt_bias", "D"), Cut("A_log", -2, (1,)))
    judged = (Piece("in_proj.weight", -1, 0), Piece("in_proj.weight", -1, 1), Piece("out_proj.weight", -2))
    smaller = lambda n: dataclasses.replace(config, expand=n / model.width)  # noqa: E731
    return (Units(count=config.inner(model), cuts=cuts, judged=judged, smaller=smaller),)


def _rwkv4_channels(config: RWKV4Config, model: ModelConfig, amount: Amount) -> Found:
    cuts = _linear("receptance", "key", "value") + _linear("output", axis=-2)
    cuts += _vectors("time_decay", "time_first")
    judged = (Piece("value.weight", -1), Piece("output.weight", -2))
    smaller = lambda n: dataclasses.replace(config, expand=n / model.width)  # noqa: E731
    return (Units(count=config.inner(model), cuts=cuts, judged=judged, smaller=smaller),)


def _mamba_states(config: MambaConfig, model: ModelConfig, amount: Amount) -> Found:
    rank = Fixed(config.rank(model))
    B, C = (Piece("x_proj.weight", -1, section) for section in (1, 2))
    cuts = (Cut("x_proj.weight", -1, (rank, 1, 1)), *_vectors("A_log", "B_norm.scale", "C_norm.scale"))
    norms = (Norm("B_norm.scale", energy=B), Norm("C_norm.scale", energy=C)) if config.norms else ()
    smaller = lambda n: dataclasses.replace(config, state=n)  # noqa: E731
    return (Units(count=config.state, cuts=cuts, judged=(B, C), smaller=smaller, norms=norms),)


def _mamba2_states(config: Mamba2Config, model: ModelConfig, amount: Amount) -> Found:
    G, inner = config.groups, Fixed(config.inner(model))
    cuts = tuple(
        Cut(f"in_proj.{name}", -1, (inner, inner, 1, 1, Fixed(config.heads(model)))) for name in ("weight", "bias")
    )
    cuts += tuple(Cut(f"conv_{name}", -1, (inner, 1, 1)) for name in ("weight", "bias"))
    judged = (Piece("in_proj.weight", -1, 2), Piece("in_proj.weight", -1, 3))
    smaller = lambda n: dataclasses.replace(config, state=n // G)  # noqa: E731
    return (Units(count=G * config.state, of=config.state, buckets=G, cuts=cuts, judged=judged, smaller=smaller),)


def _mamba3_states(config: Mamba3Config, model: ModelConfig, amount: Amount) -> Found:
    return "its states turn in pairs, by the same angles in all heads"


def _neurons(*names: str) -> Callable[[Any, ModelConfig, Amount], Found]:
    """Those of matrices up (of which the last writes the hidden layer) and one down."""
    *up, down = names

    def found(config: Any, model: ModelConfig, amount: Amount) -> Found:
        whole = {"round_to": 1} if isinstance(config, GatedMLPConfig) else {}
        smaller = lambda n: dataclasses.replace(config, expand=n / model.width, **whole)  # noqa: E731
        judged = (*(Piece(f"{name}.weight", -1) for name in up), Piece(f"{down}.weight", -2))
        cuts = _linear(*up) + _linear(down, axis=-2)
        return (Units(count=config.hidden(model), cuts=cuts, judged=judged, smaller=smaller),)

    return found


def _expert_neurons(config: MoEConfig, model: ModelConfig, amount: Amount) -> Found:
    up = ("up", "gate") if config.gated else ("up",)
    (own,) = _neurons(*up, "down")(config, model, amount)
    assert not isinstance(own, str)
    own = dataclasses.replace(own, stack=1)
    if not config.shared:
        return (own,)
    names = [f"shared.{name}" for name in (*up, "down")]
    (shared,) = _neurons(*names)(config, model, amount)
    assert not isinstance(shared, str)
    wide = {"count": config.shared * own.count, "buckets": config.shared, "smaller": None}
    return own, dataclasses.replace(shared, **wide)


def _experts(config: MoEConfig, model: ModelConfig, amount: Amount) -> Found:
    names = ("up", "gate", "down") if config.gated else ("up", "down")
    cuts = (*_linear("router"), *(Cut(f"{name}.weight", -3, (1,)) for name in names))
    judged = tuple(Piece(f"{name}.weight", -3) for name in names)
    smaller = lambda n: dataclasses.replace(config, experts=n, top_k=min(n, config.top_k))  # noqa: E731
    return (Units(count=config.experts, cuts=cuts, judged=judged, smaller=smaller, used="up.weight"),)


UNITS: dict[str, dict[type[LayerConfig], Callable[[Any, ModelConfig, Amount], Found]]] = {
    "heads": {
        AttentionConfig: _attention_heads,
        Mamba2Config: _mamba2_heads,
        Mamba3Config: _mamba3_heads,
        MLSTMConfig: _mlstm_heads,
        MLSTMBlockConfig: _mlstm_block_heads,
        RWKV6Config: _rwkv6_heads,
        RWKV7Config: _rwkv7_heads,
        SLSTMConfig: _slstm_heads,
    },
    "neurons": {
        GatedMLPConfig: _neurons("up", "gate", "down"),
        MLPConfig: _neurons("up", "down"),
        MoEConfig: _expert_neurons,
        RWKV4ChannelConfig: _neurons("key", "value"),
        RWKV6ChannelConfig: _neurons("key", "value"),
        RWKV7ChannelConfig: _neurons("key", "value"),
    },
    "experts": {MoEConfig: _experts},
    "channels": {MambaConfig: _mamba_channels, RWKV4Config: _rwkv4_channels},
    "states": {MambaConfig: _mamba_states, Mamba2Config: _mamba2_states, Mamba3Config: _mamba3_states},
}
"""By what is taken out, and the kind of layer."""
