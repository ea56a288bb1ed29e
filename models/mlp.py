"""Channel mixers: the multilayer perceptron and its gated form."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.config import LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.layers import Linear
from phyla.models.weights import fan_in

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"]
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True, kw_only=True)
class MLPConfig(LayerConfig):
    """down(activation(up(x)))."""

    expand: float = 4.0
    """Hidden width over the model's width."""
    activation: Activation = "gelu"
    """Between the two."""
    bias: bool = False
    """Biases on both."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        """See `LayerConfig.build`."""
        if self.hidden(model) < 1:
            raise UserError(f"mlp.expand must give at least one hidden channel, not {self.expand}")
        return MLP(self, model, rngs)

    def hidden(self, model: ModelConfig) -> int:
        """The hidden width."""
        return round(self.expand * model.width)


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(MLPConfig):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020)."""

    expand: float = 8 / 3
    """Hidden width over the model's width."""
    activation: Activation = "silu"
    """Of the gate."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
        """See `LayerConfig.build`."""
        super().build(model, rngs)
        return GatedMLP(self, model, rngs)


class MLP(nnx.Module):
    """See `MLPConfig`."""

    def __init__(self, config: MLPConfig, model: ModelConfig, rngs: nnx.Rngs):
        d, hidden = model.width, config.hidden(model)
        self.activation = config.activation
        self.up = Linear((d, hidden), ("embed", "mlp"), rngs, bias=config.bias)
        out = fan_in(1 / math.sqrt(2 * model.layers))
        self.down = Linear((hidden, d), ("mlp", "embed"), rngs, bias=config.bias, init=out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMLP(MLP):
    """See `GatedMLPConfig`."""

    def __init__(self, config: GatedMLPConfig, model: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, model, rngs)
        self.gate = Linear((model.width, config.hidden(model)), ("embed", "mlp"), rngs, bias=config.bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
