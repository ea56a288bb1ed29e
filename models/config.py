"""What a model is, as frozen data: an embedding, a repeated pattern of blocks, a norm and a head.

A block names a sequence mixer and a channel mixer by their configuration; each configuration is defined beside the
module that it builds (`phyla.models.mixers`, `phyla.models.mlp`) and listed in `phyla.models.registry`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from phyla.models.errors import UserError

if TYPE_CHECKING:
    from flax import nnx


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Base of every mixer's and channel mixer's configuration."""

    def build(self, model: "ModelConfig", rngs: "nnx.Rngs") -> Any:
        """The module: `mixer(x_BxTxD, state, segment_ids) -> (y_BxTxD, state)` or `channel(x_BxTxD) -> y_BxTxD`.

        Raises UserError, naming the field, for a value that does not fit the model.
        """
        raise TypeError(f"{type(self).__name__} is abstract; use one of phyla.models.registry.LAYERS")

    def flops_per_token(self, model: "ModelConfig", length: int) -> float:
        """Forward floating-point operations per token beyond those of the weight matrices, at a context of `length`."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """x + mixer(norm(x)), then x + channel(norm(x)); no channel mixer if None."""

    mixer: LayerConfig
    channel: LayerConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model."""

    width: int = 256
    """D, the width of the residual stream."""
    layers: int = 4
    """Number of blocks: a multiple of the pattern's length."""
    pattern: tuple[BlockConfig, ...]
    """The blocks that repeat."""
    vocab_size: int | None = None
    """V; None takes the tokenizer's."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the head."""
    learned_positions: int = 0
    """Longest sequence of a learned position embedding; 0 for none."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before every mixer, channel mixer and head."""
    norm_epsilon: float = 1e-5
    """Added to the variance (or mean square)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters, residual stream, state and losses are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes of a block: nothing, all but matrix products, or everything."""

    def __post_init__(self):
        for name in ("width", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if not self.pattern:
            raise UserError("model.pattern must have at least one block")
        if self.layers % len(self.pattern):
            period = len(self.pattern)
            nearest = max(1, round(self.layers / period)) * period
            raise UserError(
                f"model.layers must be a multiple of the pattern's length {period}, not {self.layers}; "
                f"nearest: {nearest}"
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"model.vocab_size must be at least 1, not {self.vocab_size}")
        if self.learned_positions < 0:
            raise UserError(f"model.learned_positions must be at least 0, not {self.learned_positions}")

    @property
    def repeats(self) -> int:
        """How often the pattern repeats."""
        return self.layers // len(self.pattern)
