"""One experiment as frozen data: a model, its data, an optimizer, a schedule and a mesh."""

from dataclasses import dataclass, field
from typing import Literal

from phyla.models.config import ModelConfig
from phyla.models.errors import UserError, check_divides
from phyla.training.data.config import DataConfig


def at_least(section: str, config: object, **minimum: float) -> None:
    """Raises UserError, naming the field, if one is below its minimum."""
    for name, least in minimum.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{section}.{name} must be at least {least}, not {value}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer, its schedule and its clipping."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """Muon treats matrices; everything else gets AdamW."""
    learning_rate: float = 2e-3
    """At the schedule's peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warmup: a cosine to the end; stable, then a linear decay (warmup-stable-decay); or constant."""
    warmup_fraction: float = 0.05
    """Share of the steps that warm up linearly."""
    decay_fraction: float = 0.2
    """Share of the steps that decay, for wsd."""
    final_fraction: float = 0.1
    """Last learning rate over the peak."""
    weight_decay: float = 0.1
    """Decoupled; matrices only (norms, biases, A_log, D are exempt)."""
    beta1: float = 0.9
    """First moment (momentum)."""
    beta2: float = 0.95
    """Second moment; Lion's slow momentum."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        at_least("optimizer", self, learning_rate=0, weight_decay=0, warmup_fraction=0, decay_fraction=0)
        at_least("optimizer", self, final_fraction=0, beta1=0, beta2=0, epsilon=0)
        if not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm must be positive, not {self.clip_norm}")
        if self.warmup_fraction + (self.decay_fraction if self.schedule == "wsd" else 0) > 1:
            raise UserError("optimizer.warmup_fraction and optimizer.decay_fraction must not exceed 1 together")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which weights become exactly zero while training, and stay so; of the matrices that `phyla compress` prunes."""

    hold: bool = True
    """Of a model that was pruned before (by a recipe, or by training with this section), zeros stay zeros."""
    final: float = 0.0
    """Share of each matrix that is zero in the end; 0: none."""
    method: Literal["magnitude", "rigl"] = "magnitude"
    """The smallest go one after another, 1 - (1 - progress)³ of the final share; or all at once, the largest of the
    first weights staying, and then the smallest are exchanged for those with the largest gradients (RigL)."""
    begin: float = 0.1
    """Share of the steps after which it begins."""
    end: float = 0.75
    """Share of the steps after which nothing changes any more."""
    every: int = 20
    """Steps between changes."""
    swapped: float = 0.3
    """Of RigL: the share of the weights exchanged at first; it falls to 0 as a cosine."""
    l1: float = 0.0
    """Each step brings weights nearer to 0 by this times the learning rate (as weight decay: no part of the loss)."""
    group_lasso: float = 0.0
    """The same of each group as a whole, its norm by this times the learning rate and the root of its size."""
    groups: Literal["heads", "neurons", "experts", "channels", "states"] = "neurons"
    """What a group is: the weights through which a unit, as `prune-neurons-25%` takes it out, adds anything."""

    def __post_init__(self):
        at_least("sparsity", self, final=0, begin=0, every=1, swapped=0, l1=0, group_lasso=0)
        if self.final >= 1:
            raise UserError(f"sparsity.final is a share below 1, not {self.final}")
        if not self.begin <= self.end <= 1:
            raise UserError(f"sparsity.end must be from sparsity.begin {self.begin} to 1, not {self.end}")
        if self.swapped > 1:
            raise UserError(f"sparsity.swapped is a share, not {self.swapped}")

    @property
    def makes_zeros(self) -> bool:
        """Whether it makes any that were not there."""
        return self.final > 0 or self.l1 > 0 or self.group_lasso > 0


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often, from which seed."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step, over all devices and microbatches."""
    microbatches: int = 1
    """Gradient accumulation: parts in which a batch is computed."""
    seed: int = 0
    """Of the initialisation and of the data's order."""
    eval_every: int = 200
    """Steps between validations (and one at the end)."""
    eval_tokens: int | None = 65_536
    """Validation tokens during training; the last validation uses all. None: always all."""
    checkpoint_every: int = 200
    """Steps between checkpoints (and one at the end)."""
    keep: int = 2
    """Latest checkpoints kept; the best one on validation is kept beside them."""
    log_every: int = 10
    """Steps between lines of metrics."""
    ema: float = 0.0
    """Decay of an exponential moving average of the parameters, used to evaluate; 0: none."""
    max_skipped: int = 10
    """Non-finite updates in a row after which the run stops."""
    loss_chunk: int = 8192
    """Tokens whose logits exist at one time, when the vocabulary is large."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""

    def __post_init__(self):
        at_least("loop", self, steps=1, batch_size=1, microbatches=1, eval_every=1, eval_tokens=1, seed=0)
        at_least("loop", self, checkpoint_every=1, keep=1, log_every=1, ema=0, max_skipped=1, loss_chunk=1)
        if self.ema >= 1:
            raise UserError(f"loop.ema must be below 1, not {self.ema}")
        check_divides("loop.microbatches", self.microbatches, "loop.batch_size", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ways each kind of parallelism divides the devices."""

    data: int = -1
    """Copies of the model, each with a share of the batch; -1: all devices that the others leave."""
    fsdp: int = 1
    """Ways the parameters are divided, with the batch."""
    tensor: int = 1
    """Ways each layer's width is divided."""

    def __post_init__(self):
        at_least("mesh", self, fsdp=1, tensor=1)
        if self.data < 1 and self.data != -1:
            raise UserError(f"mesh.data must be at least 1, or -1 for the rest of the devices, not {self.data}")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a student learns from its teacher: a weighted sum, in which a weight of 0 leaves a term out.

    Each term is a mean over the tokens that the objective asks for.
    """

    soft: float = 0.9
    """Weight of the teacher's distribution: T² times the divergence from it (Hinton et al. 2015)."""
    hard: float = 0.1
    """Weight of the right tokens' cross-entropy, which is all that training without a teacher minimises."""
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon"] = "forward-kl"
    """KL(teacher, student), KL(student, teacher), or the mean of both from the mixture of the two."""
    temperature: float = 1.0
    """T, by which the logits of both are divided for the divergence."""
    top_k: int | None = None
    """Of the teacher's distribution only the k likeliest tokens, and all others together as one; None: all."""
    cache: str | None = None
    """Folder that keeps what `top_k` leaves of the teacher's distribution for every row of the training text: it is
    computed once, and the teacher is in memory only for that. None: the teacher is asked at every step."""
    cosine: float = 0.0
    """Weight of 1 - cosine of the last hidden states (Sanh et al. 2019)."""
    hidden: float = 0.0
    """Weight of the mean squared difference of hidden states, summed over the student's layers (Jiao et al. 2020)."""
    embedding: float = 0.0
    """Weight of the mean squared difference of what enters the first block (Jiao et al. 2020)."""
    blocks: float = 0.0
    """Weight of the mean squared difference of what each block gives for the teacher's input to it, summed over blocks
    (Bick et al. 2024, the second stage); both models have one width and as many layers."""
    mixing: float = 0.0
    """Weight of the squared difference of mixing matrices, those of one head in a row summed, for the teacher's input
    to each mixer (Bick et al. 2024, the first stage); both models have one width, and as many layers and heads."""
    attention: float = 0.0
    """Weight of the mean squared difference of attention's scores before the softmax, summed over the student's layers
    (Jiao et al. 2020)."""
    relations: float = 0.0
    """Weight of KL(teacher, student) of `relation_kinds` in the student's last layer, summed (Wang et al. 2020)."""
    relation_kinds: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    """Softmax of the products of queries, keys and values: qk is what attention does."""
    relation_heads: int | None = None
    """Into how many heads both models' queries, keys and values are divided anew for `relations` (Wang et al. 2021);
    None: their own, of which both have as many."""
    layers: tuple[int, ...] = ()
    """For `hidden`, `attention` and (the last) `relations`: of each layer of the student the teacher's, from 1; none:
    evenly spaced, the last to the last."""
    copy: bool = False
    """Begin with what of the teacher's parameters fits, each layer from the teacher's at the same relative depth."""

    def __post_init__(self):
        inner = "cosine", "hidden", "embedding", "blocks", "mixing", "attention", "relations"
        weights = "soft", "hard", *inner
        at_least("distillation", self, **dict.fromkeys(weights, 0.0))
        if not any(getattr(self, name) for name in weights):
            raise UserError(f"distillation must have a weight above 0: one of {', '.join(weights)}")
        if not self.temperature > 0:
            raise UserError(f"distillation.temperature must be positive, not {self.temperature}")
        at_least("distillation", self, top_k=1, relation_heads=1)
        if not self.relation_kinds:
            raise UserError("distillation.relation_kinds must name one at least: qk, vv, qq, kk")
        if self.cache is not None:
            if self.top_k is None or not self.soft:
                raise UserError("distillation.cache keeps the likeliest tokens: it needs distillation.top_k and soft")
            surplus = [name for name in inner if getattr(self, name)]
            if surplus:
                raise UserError(f"distillation.cache keeps no hidden states: distillation.{surplus[0]} must be 0")


DISTILLATIONS = {
    "logits": DistillationConfig(),
    "distilbert": DistillationConfig(soft=5.0, hard=2.0, temperature=2.0, cosine=1.0, copy=True),
    "hidden": DistillationConfig(hidden=1.0, embedding=1.0),
    "tinybert-layers": DistillationConfig(soft=0.0, hard=0.0, hidden=1.0, embedding=1.0, attention=1.0),
    "tinybert-prediction": DistillationConfig(soft=1.0, hard=0.0),
    "minilm": DistillationConfig(soft=0.0, hard=0.0, relations=1.0),
    "minilm-v2": DistillationConfig(soft=0.0, hard=0.0, relations=1.0, relation_kinds=("qq", "kk", "vv")),
    "mamba-in-llama": DistillationConfig(copy=True),
    "mohawk-mixing": DistillationConfig(soft=0.0, hard=0.0, mixing=1.0, copy=True),
    "mohawk-blocks": DistillationConfig(soft=0.0, hard=0.0, blocks=1.0, copy=True),
    "mohawk-logits": DistillationConfig(soft=1.0, hard=0.0, copy=True),
}
"""Recipes by name: for each its published ingredients (docs/distillation.md)."""

STAGES = {
    "tinybert": ("tinybert-layers", "tinybert-prediction"),
    "mohawk": ("mohawk-mixing", "mohawk-blocks", "mohawk-logits"),
}
"""Recipes of several: each begins with what the one before made."""

MIXERS_ALONE = r"bitfit@\.mixer\."
"""What freezes a student but for its mixers: a recipe of `phyla.compression.recipes`."""

OF_MIXERS = "mohawk-mixing", "mohawk-blocks"
"""Which recipes train the mixers alone, as published."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run is made of."""

    name: str
    """Of the experiment."""
    model: ModelConfig
    base: str | None = None
    """Folder of the run whose model training starts from; None: a new model."""
    recipes: str = ""
    """What is done to the model before it is trained: names chained with + (`phyla compress --list`)."""
    objective: Literal["next-token", "masked-token"] = "next-token"
    """What is predicted: each next token, or hidden ones from both sides (for encoders)."""
    teacher: str | None = None
    """Folder of the run whose model is distilled into this one; None: no teacher."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.objective == "next-token" and self.model.bidirectional:
            raise UserError("a bidirectional model sees the next token: objective must be masked-token")
        if self.objective == "masked-token" and self.data.template is not None:
            raise UserError("conversations (data.template) are learned with the objective next-token")
        if self.sparsity.makes_zeros and self.loop.ema:
            raise UserError("an average of weights has not the zeros that sparsity makes: loop.ema must be 0")
