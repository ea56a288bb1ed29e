"""A new model's parameters against the published recipes: mean, spread, and what is special.

What multiplies activations is normal(1 / √in) and what is added to the residual stream smaller with depth, whatever the
architecture; embeddings are GPT-2's normal(0.02). Beyond that each mixer has its authors' recipe, written down here
a second time, in NumPy.
"""

import dataclasses
import math
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from tests.models.conftest import ARCHITECTURES

D, V, L = 64, 512, 4
INNER, HEADS, N = 2 * D, 2 * D // 8, 4


class Random(NamedTuple):
    """Independent numbers of mean 0, as if from a distribution with this standard deviation and these limits."""

    std: float
    most: float

    def check(self, values: np.ndarray) -> None:
        n = values.size
        assert abs(values.mean()) < 5 * self.std / math.sqrt(n)
        assert abs(values.std() / self.std - 1) < 5 / math.sqrt(2 * n)
        assert np.abs(values).max() <= self.most
        assert np.unique(values).size > 0.9 * n


class Between(NamedTuple):
    """Uniform after `unfold`."""

    low: float
    high: float
    unfold: Callable = np.asarray

    def check(self, values: np.ndarray) -> None:
        values, wide = self.unfold(values), self.high - self.low
        assert values.min() >= self.low - 1e-4 * wide
        assert values.max() <= self.high + 1e-4 * wide
        assert abs(values.mean() - (self.low + self.high) / 2) < 5 * wide / math.sqrt(12 * values.size)
        assert abs(values.std() * math.sqrt(12) / wide - 1) < 5 / math.sqrt(2 * values.size)


class Orthogonal(NamedTuple):
    """Rows or columns at right angles, whichever are fewer, of this length."""

    gain: float

    def check(self, values: np.ndarray) -> None:
        tall = values if values.shape[0] >= values.shape[1] else values.T
        np.testing.assert_allclose(tall.T @ tall, self.gain**2 * np.eye(tall.shape[1]), atol=1e-5 * self.gain**2)


class Exactly(NamedTuple):
    """These numbers, in each layer."""

    values: float | np.ndarray

    def check(self, values: np.ndarray) -> None:
        np.testing.assert_allclose(values, np.broadcast_to(self.values, values.shape), rtol=1e-5, atol=1e-6)


def normal(std: float) -> Random:
    return Random(std, 6 * std)


def uniform(bound: float) -> Random:
    return Random(bound / math.sqrt(3), bound)


def fan_in(width: int, branches: float = 1) -> Random:
    """Of `branches` things that are added to the residual stream, each gets its share of the variance."""
    return normal(1 / math.sqrt(width * branches))


def step_sizes(dt_bias: np.ndarray) -> np.ndarray:
    """log Δ, of the inverse of the softplus."""
    return np.log(np.log1p(np.exp(dt_bias.astype(np.float64))))


ONE, ZERO = Exactly(1.0), Exactly(0.0)
SMALL = normal(math.sqrt(2 / (5 * D)))  # Nguyen and Salazar 2019
WANG = normal(2 / L / math.sqrt(D))  # Wang and Komatsuzaki 2021
TAPS = uniform(0.5)  # of four taps, PyTorch's default for a convolution
STEPS = Between(math.log(1e-3), math.log(0.1), step_sizes)  # Gu and Dao 2023, section 3.6
MODEL = {
    "*embedding.weight": normal(0.02),
    "head.weight": fan_in(D),
    "*norm.scale": ONE,
    "*norm.bias": ZERO,
}
ATTENTION = {"mixer.[qkv].weight": fan_in(D), "mixer.o.weight": fan_in(D, 2 * L), "mixer.?.bias": ZERO}
"""Radford et al. 2019: what is added to the residual stream 2 L times, over √(2 L)."""
MLP = {
    "channel.up.weight": fan_in(D),
    "channel.gate.weight": fan_in(D),
    "channel.*.bias": ZERO,
}
FORGET = Exactly(np.linspace(3, 6, 2))


def channel(width: int) -> dict:
    """A channel mixer of this hidden width."""
    return MLP | {"channel.down.weight": fan_in(width, 2 * L)}


MAMBA = {
    "mixer.in_proj.weight": fan_in(D),
    "mixer.conv_*": TAPS,
    "mixer.x_proj.weight": fan_in(INNER),
    "mixer.dt_proj.weight": uniform((D / 16) ** -0.5),
    "mixer.dt_bias": STEPS,
    "mixer.A_log": Exactly(np.log(np.arange(1, N + 1))),  # S4D-real
    "mixer.D": ONE,
    "mixer.out_proj.weight": fan_in(INNER, L),
}
"""Gu and Dao 2023 and their code."""
MAMBA2 = {
    "mixer.in_proj.weight": fan_in(D),
    "mixer.conv_*": TAPS,
    "mixer.dt_bias": STEPS,
    "mixer.A_log": Between(1, 16, np.exp),
    "mixer.D": ONE,
    "mixer.out_proj.weight": fan_in(INNER, L),
}
"""Dao and Gu 2024 and their code."""
MAMBA3 = {
    "mixer.in_proj.weight": fan_in(D),
    "mixer.dt_bias": STEPS,
    "mixer.[BC]_bias": ONE,
    "mixer.D": ONE,
    "mixer.out_proj.weight": fan_in(INNER, L),
}
MLSTM = {
    "mixer.[qkv].weight": SMALL,
    "mixer.o_gate.weight": SMALL,
    "mixer.[if]_gate.weight": ZERO,
    "mixer.i_bias": Exactly(-10.0),
    "mixer.f_bias": FORGET,
    "mixer.out.weight": WANG,
}
"""Beck et al. 2025, xLSTM-7B, and NX-AI's code."""
MLSTM_BLOCK = {
    "mixer.up.weight": SMALL,
    "mixer.conv_*": TAPS,
    "mixer.[qkv].weight": SMALL,
    "mixer.[if]_gate.weight": ZERO,
    "mixer.i_bias": normal(0.1),
    "mixer.f_bias": FORGET,
    "mixer.skip": ONE,
    "mixer.down.weight": WANG,
}
"""Beck et al. 2024, and NX-AI's code."""


def slstm(layer: int) -> dict:
    """Beck et al. 2024, and NX-AI's code: forget gates by a power law of the channel ("powerlaw_blockdependent")."""
    bias = np.zeros((4, 4, D // 4))
    bias[1] = -(-5 + 12 * (np.arange(D // 4) / (D // 4 - 1)) ** (0.3 + 1.3 * layer / (L - 1)))
    return {
        "mixer.conv_*": TAPS,
        "mixer.[ifzo].weight": SMALL,
        "mixer.recurrent": ZERO,
        "mixer.bias": Exactly(bias),
    }


def rwkv4(layer: int) -> dict:
    """Peng et al. 2023, and RWKV-LM's RWKV-v4."""
    depth, ahead, i = layer / (L - 1), 1 - layer / L, np.arange(D)
    return {
        "mixer.time_decay": Exactly(-5 + 8 * (i / (D - 1)) ** (0.7 + 1.3 * depth)),
        "mixer.time_first": Exactly(math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)),
        "mixer.mix_k": Exactly((i / D) ** ahead),
        "mixer.mix_v": Exactly((i / D) ** ahead + 0.3 * depth),
        "mixer.mix_r": Exactly((i / D) ** (0.5 * ahead)),
        "mixer.value.weight": Orthogonal(1.0),
        "mixer.*.weight": ZERO,
        "channel.mix_?": Exactly((i / D) ** ahead),
        "channel.key.weight": Orthogonal(2.0),
        "channel.*.weight": ZERO,
    }


def rwkv6(layer: int) -> dict:
    """Peng et al. 2024, and RWKV-LM's RWKV-v6."""
    depth, ahead, i = layer / (L - 1), 1 - layer / L, np.arange(D)
    return {
        "mixer.time_decay": Exactly(-6 + 5 * (i / (D - 1)) ** (0.7 + 1.3 * depth)),
        "mixer.time_first": Exactly(depth * (1 - i / (D - 1)) + 0.1 * ((i + 1) % 3 - 1)),
        "mixer.mix_[xwk]": Exactly(1 - (i / D) ** ahead),
        "mixer.mix_v": Exactly(1 - ((i / D) ** ahead + 0.3 * depth)),
        "mixer.mix_[rg]": Exactly(1 - (i / D) ** (0.5 * ahead)),
        "mixer.mix_up.*": uniform(0.01),
        "mixer.decay_up.weight": uniform(0.01),
        "mixer.receptance.weight": Orthogonal(1.0),
        "mixer.value.weight": Orthogonal(1.0),
        "mixer.key.weight": Orthogonal(0.1),
        "mixer.gate.weight": Orthogonal(0.1),
        "mixer.*.weight": ZERO,
        "mixer.norm_scale": Exactly(((1 + layer) / L) ** 0.7),
        "mixer.norm_bias": ZERO,
        "channel.mix_?": Exactly((i / D) ** ahead),
        "channel.key.weight": Orthogonal(1.0),
        "channel.*.weight": ZERO,
    }


def rwkv7(layer: int) -> dict:
    """Peng et al. 2025, and RWKV-LM's RWKV-v7."""
    depth, ahead, i, K = layer / (L - 1), 1 - layer / L, np.arange(D), 8
    linear = i / (D - 1) - 0.5
    zigzag = ((i % K) - (K - 1) / 2) / ((K - 1) / 2)
    zigzag = zigzag * abs(zigzag)
    return {
        **{f"mixer.x_{name}": Exactly(1 - (i / D) ** (0.2 * ahead)) for name in "rg"},
        **{f"mixer.x_{name}": Exactly(1 - (i / D) ** (0.7 * ahead)) for name in "kv"},
        **{f"mixer.x_{name}": Exactly(1 - (i / D) ** (0.9 * ahead)) for name in "wa"},
        "mixer.w0": Exactly(-6 + 6 * (i / (D - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag),
        "mixer.a0": Exactly(-0.19 + 0.3 * zigzag + 0.4 * linear),
        "mixer.v0": Exactly(0.73 - 0.4 * linear),
        "mixer.k_k": Exactly(0.71 - 0.1 * linear),
        "mixer.k_a": Exactly(1.02),
        "mixer.r_k": Exactly(-0.04),
        "mixer.?.down.weight": ZERO,
        "mixer.?.up.weight": Orthogonal(0.1),
        "mixer.receptance.weight": uniform(0.5 / math.sqrt(D)),
        "mixer.key.weight": uniform(0.05 / math.sqrt(D)),
        "mixer.value.weight": uniform(0.5 / math.sqrt(D)),
        "mixer.output.weight": ZERO,
        "mixer.norm_scale": Exactly(((1 + layer) / L) ** 0.7),
        "mixer.norm_bias": ZERO,
        "channel.x_k": Exactly(1 - (i / D) ** (ahead**4)),
        "channel.key.weight": uniform(0.5 / math.sqrt(D)),
        "channel.value.weight": ZERO,
    }


RECIPES: dict[str, Callable[[int], dict]] = {
    "attention": lambda layer: ATTENTION | channel(171),
    "attention-learned": lambda layer: ATTENTION | channel(4 * D),
    "moe": lambda layer: (
        ATTENTION
        | {"channel.router.weight": normal(0.02)}
        | {f"channel.{path}.weight": fan_in(D) for path in ("up", "gate", "shared.up")}
        | {"channel.shared.down.weight": fan_in(2 * 96, 2 * L)}
        | {"channel.down.weight": fan_in(96 if layer else 171, 2 * L)}
    ),
    "mamba": lambda layer: MAMBA,
    "mamba2": lambda layer: MAMBA2,
    "mamba3": lambda layer: MAMBA3,
    "rwkv4": rwkv4,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "mlstm": lambda layer: MLSTM | channel(171),
    "mlstm-block": lambda layer: MLSTM_BLOCK,
    "slstm": lambda layer: slstm(layer) | channel(88),
}
"""By architecture of the contract suite and layer: from a pattern of paths to what holds for those that match."""


def layers_of(state) -> list[tuple[int | None, str, np.ndarray]]:
    """The layer (None: of the model), the path in it and the values, of each parameter and each layer of a stack."""
    flat: list[tuple[tuple[Any, ...], np.ndarray]] = [
        (p, np.asarray(leaf[...])) for p, leaf in nnx.to_flat_state(state)
    ]
    before = len({path[1] for path, _ in flat if path[0] == "prefix"})
    blocks = len({path[2] for path, _ in flat if path[0] == "periods"})
    found = []
    for path, values in flat:
        if path[0] == "prefix":
            found.append((path[1], path[2:], values))
        elif path[0] == "periods":
            found += [(before + blocks * i + path[2], path[3:], of_one) for i, of_one in enumerate(values)]
        else:
            found.append((None, path, values))
    return [(layer, ".".join(map(str, path)), values) for layer, path, values in found]


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_follows_its_recipe(name):
    config = dataclasses.replace(ARCHITECTURES[name], width=D, vocab_size=V, layers=L)
    config = dataclasses.replace(config, pattern=tuple(map(as_published, config.pattern)))
    for layer, path, values in layers_of(nnx.state(LanguageModel(config, nnx.Rngs(0)))):
        recipe = MODEL if layer is None else RECIPES[name](layer) | MODEL
        rules = [rule for pattern, rule in recipe.items() if fnmatch(path, pattern)]
        assert rules, f"{path} has no recipe"
        try:
            rules[0].check(values)
        except AssertionError as error:
            raise AssertionError(f"layer {layer}, {path}: {rules[0]}") from error


def as_published(block: BlockConfig) -> BlockConfig:
    """With the input gates' own bias: the contract suite opens them."""
    if isinstance(block.mixer, MLSTMConfig | MLSTMBlockConfig):
        return dataclasses.replace(
            block, mixer=dataclasses.replace(block.mixer, input_bias=type(block.mixer).input_bias)
        )
    return block
