"""Channel mixers: the multilayer perceptron and its gated form."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from phyla.models.config import Activation, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.layers import ACTIVATIONS, Layer, Linear
from phyla.models.weights import fan_in


@dataclass(frozen=True, kw_only=True)
class MLPConfig(LayerConfig):
    """down(activation(up(x)))."""

    expand: float = 4.0
    """Hidden width over the model's width."""
    activation: Activation = "gelu"
    """Between the two."""
    bias: bool = False
    """Biases on both."""

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "MLP":
        """See `LayerConfig.build`."""
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
    round_to: int = 1
    """The hidden width is rounded up to a multiple of this; 1: to the nearest integer."""

    def hidden(self, model: ModelConfig) -> int:
        """The hidden width."""
        if self.round_to == 1:
            return super().hidden(model)
        return math.ceil(self.expand * model.width / self.round_to) * self.round_to

    def build(self, model: ModelConfig, rngs: nnx.Rngs, layer: jax.Array | int) -> "GatedMLP":
        """See `LayerConfig.build`."""
        if self.round_to < 1:
            raise UserError(f"gated_mlp.round_to must be at least 1, not {self.round_to}")
        return GatedMLP(self, model, rngs)


class MLP(Layer):
    """See `MLPConfig`."""

    def __init__(self, config: MLPConfig, model: ModelConfig, rngs: nnx.Rngs):
        d, hidden = model.width, config.hidden(model)
        if hidden < 1:
            raise UserError(f"mlp.expand must give at least one hidden channel, not {config.expand}")
        self.activation = config.activation
        self.up = Linear((d, hidden), ("embed", "mlp"), rngs, bias=config.bias)
        out = fan_in(1 / math.sqrt(2 * model.layers))
        self.down = Linear((hidden, d), ("mlp", "embed"), rngs, bias=config.bias, init=out)

    def __call__(
        self, x: jax.Array, state: None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """[..., D] -> [..., D]; stateless."""
        return self.down(ACTIVATIONS[self.activation](self.up(x))), None


class GatedMLP(MLP):
    """See `GatedMLPConfig`."""

    def __init__(self, config: GatedMLPConfig, model: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, model, rngs)
        self.gate = Linear((model.width, config.hidden(model)), ("embed", "mlp"), rngs, bias=config.bias)

    def __call__(
        self, x: jax.Array, state: None = None, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """[..., D] -> [..., D]; stateless."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)), None
