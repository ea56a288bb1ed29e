"""What a model is, as frozen data: an embedding, blocks (a repeated pattern), a norm and a head.

A block names a sequence mixer and a channel mixer by their configuration; each configuration is defined beside the
module that it builds (`phyla.models.mixers`, `phyla.models.mlp`) and listed in `phyla.models.registry`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phyla.models.errors import UserError

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from phyla.models.layers import Layer

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Base of every mixer's and channel mixer's configuration."""

    def build(self, model: "ModelConfig", rngs: "nnx.Rngs", layer: "jax.Array | int") -> "Layer":
        """The module.

        Args:
            model: what it is part of.
            rngs: for its parameters.
            layer: the block's index in the model, for initialisations that depend on depth; may be traced.

        Raises UserError, naming the field, for a value that does not fit the model.
        """
        raise TypeError(f"{type(self).__name__} is abstract; use one of phyla.models.registry.LAYERS")

    def flops_per_token(self, model: "ModelConfig", length: int) -> float:
        """Forward floating-point operations per token beyond those of the weight matrices, at a context of `length`."""
        return 0.0

    def mixing_heads(self, model: "ModelConfig") -> int | None:
        """How many mixing matrices it has (`Layer.mixing`); None: it is not linear in values that it weighs by head."""
        return None


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A sequence mixer and a channel mixer (or none), each normalised and added to the residual stream."""

    mixer: LayerConfig
    channel: LayerConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model."""

    width: int = 256
    """D, the width of the residual stream."""
    layers: int = 4
    """Number of blocks: those of the prefix, and a multiple of the pattern's length."""
    pattern: tuple[BlockConfig, ...]
    """The blocks that repeat."""
    prefix: tuple[BlockConfig, ...] = ()
    """Blocks before those that repeat."""
    groups: int | None = None
    """Sets of parameters that the pattern's repeats share, each used for as many repeats in a row (ALBERT: 1);
    None: every repeat has its own."""
    vocab_size: int | None = None
    """V; None takes the tokenizer's."""
    embedding_width: int | None = None
    """E, the width of the embeddings, projected to the model's (ALBERT); None: the model's width, not projected."""
    learned_positions: int = 0
    """Longest sequence of a learned position embedding; 0 for none."""
    token_types: int = 0
    """Kinds of tokens that have an embedding of their own (BERT: 2); 0 for none."""
    embedding_norm: bool = False
    """Normalise the sum of the embeddings (BERT, BLOOM, RWKV)."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the head."""
    embedding_init: Literal["gpt2", "rwkv"] = "gpt2"
    """Of a new model's embedding and head: normal(0.02) and normal(1 / √D), or, to be normalised and not tied,
    uniform(1e-4) and orthogonal of gain √(V / D) / 2, at least 1/2."""
    head_transform: Activation | None = None
    """norm(activation(linear(x))) before the head (BERT's masked-token head); None for none."""
    head_bias: bool = False
    """A bias for each word on the logits."""
    pooler: bool = False
    """A sentence vector: tanh(linear(hidden of the first token)) (BERT)."""
    logit_cap: float | None = None
    """c: logits become c · tanh(logits / c); None for no cap."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of every mixer, channel mixer and head."""
    norm_bias: bool = True
    """Biases of LayerNorm."""
    norm_position: Literal["pre", "post"] = "pre"
    """x + mixer(norm(x)), or norm(x + mixer(x)) (Vaswani et al. 2017, BERT)."""
    final_norm: bool = True
    """Normalise after the last block."""
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
        repeated, period = self.layers - len(self.prefix), len(self.pattern)
        if repeated < period or repeated % period:
            nearest = len(self.prefix) + max(1, round(repeated / period)) * period
            prefix = f"{len(self.prefix)} (the prefix) and " if self.prefix else ""
            raise UserError(
                f"model.layers must be {prefix}a multiple of the pattern's length {period}, not {self.layers}; "
                f"nearest: {nearest}"
            )
        if self.groups is not None and (self.groups < 1 or self.repeats % self.groups):
            fits = [n for n in range(1, self.repeats + 1) if self.repeats % n == 0]
            nearest = min(fits, key=lambda n: abs(n - (self.groups or 0)))
            raise UserError(
                f"model.groups must divide the {self.repeats} repeats of the pattern, not {self.groups}; "
                f"nearest: {nearest}"
            )
        for name in ("vocab_size", "embedding_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} must be at least 1, not {value}")
        for name in ("learned_positions", "token_types"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} must be at least 0, not {getattr(self, name)}")
        if self.embedding_init == "rwkv" and (self.tie_embeddings or not self.embedding_norm):
            raise UserError("model.embedding_init rwkv needs model.embedding_norm true and model.tie_embeddings false")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise UserError(f"model.logit_cap must be positive, not {self.logit_cap}")

    @property
    def repeats(self) -> int:
        """How often the pattern repeats."""
        return (self.layers - len(self.prefix)) // len(self.pattern)

    @property
    def bidirectional(self) -> bool:
        """Whether a token sees those after it."""
        return any(not getattr(block.mixer, "causal", True) for block in self.blocks)

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """Every block, in order."""
        return self.prefix + self.pattern * self.repeats
