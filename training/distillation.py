"""Distillation as an objective: a student learns from a frozen teacher's distribution and its hidden states.

The teacher is part of the objective, so that the one loop trains the student, and the learned projections between
their widths, and neither changes nor saves the teacher.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel, Output
from phyla.models.layers import Linear
from phyla.models.moe import auxiliary_losses
from phyla.models.weights import freeze
from phyla.training.config import DistillationConfig, Experiment
from phyla.training.internals import (
    Pairs,
    block_distance,
    check,
    layer_pairs,
    mixing_distance,
    over_layers,
    relation_divergence,
    score_distance,
)
from phyla.training.objectives import Asker, Batch, Loss, Objective, Questions, in_chunks, negative_log_likelihood
from phyla.training.saved import make_asker

IDS, LOG_P = "lesson_ids", "lesson_log_p"
"""What a batch has besides, of a teacher that is not asked again: int32 [B, T, k] and float32 [B, T, k + 1]."""


def divergence(
    student: jax.Array, teacher: jax.Array, *, kind: str, temperature: float, top_k: int | None = None
) -> jax.Array:
    """T² times the divergence of softmax(student / T) from softmax(teacher / T), in nats.

    T² keeps the gradient's size when T changes (Hinton et al. 2015, section 2).

    Args:
        student: logits, float32 [..., V].
        teacher: logits, float32 [..., V].
        kind: forward-kl, reverse-kl or jensen-shannon.
        temperature: T.
        top_k: below V; the teacher's likeliest k tokens are told apart, all others are one (which are not left out:
            a student that is told the likeliest alone becomes too sure of them). None: all are told apart.

    Returns:
        Summed over the vocabulary, float32 [...].
    """
    log_q, log_p = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    if top_k is not None:
        chosen = jax.lax.top_k(teacher, top_k)[1]
        log_q, log_p = with_rest(log_q, chosen), with_rest(log_p, chosen)
    return temperature**2 * between(log_p, log_q, kind)


def between(log_p: jax.Array, log_q: jax.Array, kind: str) -> jax.Array:
    """The divergence of q from p, summed over outcomes, [..., n] twice to [...]."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "forward-kl":
        terms = p * (log_p - log_q)
    elif kind == "reverse-kl":
        terms = q * (log_q - log_p)
    else:
        log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        terms = (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    return jnp.sum(terms, axis=-1)


def with_rest(log_p: jax.Array, chosen: jax.Array) -> jax.Array:
    """log p [..., V] of the chosen ids [..., k], and last of all others together, [..., k + 1]."""
    of_chosen = jnp.take_along_axis(log_p, chosen, axis=-1)
    others = jnp.put_along_axis(log_p, chosen, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([of_chosen, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)


class Distillation(nnx.Module):
    """An objective. What it reports is the student's own loss, in training as in evaluation; the rest is its penalty.

    What is minimised is Σ over terms of their weight times the term, and the balance of the student's experts.
    """

    def __init__(
        self,
        config: DistillationConfig,
        teacher: LanguageModel,
        student: ModelConfig,
        ask: Asker,
        *,
        chunk: int,
        rngs: nnx.Rngs,
    ):
        """Of a teacher, which is frozen.

        Args:
            config: which terms.
            teacher: a model; its parameters are marked as not trainable.
            student: what learns.
            ask: what both are asked of a batch.
            chunk: tokens whose logits exist at one time, when the vocabulary is large.
            rngs: for the projections, where the widths differ.

        Raises UserError if a term does not fit the two.
        """
        self.config = config
        self.ask = ask
        self.chunk = chunk
        freeze(teacher)
        self.teacher = teacher
        check(config, student, teacher.config)
        mapped = config.hidden or config.attention or config.relations
        self.layers: Pairs = layer_pairs(config, student.layers, teacher.config.layers) if mapped else ()
        self.pairs = ((0, 0),) * bool(config.embedding) + self.layers * bool(config.hidden)
        count = len(self.pairs) + bool(config.cosine)
        widths = student.width, teacher.config.width
        differ = student.width != teacher.config.width
        axes = "embed", "embed_out"
        self.projections = nnx.List([Linear(widths, axes, rngs) for _ in range(count)] if differ else [])

    def __call__(self, model: LanguageModel, batch: Batch, rng: jax.Array) -> Loss:
        """See `phyla.training.objectives`; the metrics are the terms without their weights."""
        config = self.config
        model, guide = model.moved(), self.teacher.moved()
        asked = self.ask(batch, rng)
        every_layer = bool(self.pairs or self.layers or config.blocks or config.mixing)
        student = model.forward(asked.tokens, segment_ids=asked.segment_ids, layers=every_layer)
        teacher = guide.forward(asked.tokens, segment_ids=asked.segment_ids, layers=every_layer)
        teacher = jax.tree.map(jax.lax.stop_gradient, teacher)

        def of_logits(student_BxCxD: jax.Array, teacher_BxCxD: jax.Array, answers_BxC: jax.Array):
            logits = model.logits(student_BxCxD)
            right = negative_log_likelihood(logits, answers_BxC)
            if not config.soft:
                return right, jnp.zeros_like(right)
            softly = jax.lax.stop_gradient(guide.logits(teacher_BxCxD))
            kind, temperature = config.divergence, config.temperature
            return right, divergence(logits, softly, kind=kind, temperature=temperature, top_k=config.top_k)

        chunk = logits_chunk(model, asked, self.chunk)
        right, soft = in_chunks(of_logits, (student.hidden, teacher.hidden, asked.answers), chunk=chunk)

        def total(x_BxT: jax.Array) -> jax.Array:
            return jnp.sum(x_BxT * asked.weights)

        terms: dict[str, tuple[float, jax.Array]] = {}
        if config.soft:
            terms["soft"] = config.soft, total(soft)
        if config.cosine:
            mapped = self._project(-1, student.hidden)
            terms["cosine"] = config.cosine, total(1 - cosine(mapped, teacher.hidden))
        mine, its = student.layers, teacher.layers
        for i, (layer, other) in enumerate(self.pairs):
            assert mine is not None
            assert its is not None
            difference = self._project(i, mine[layer]) - its[other]
            name = "hidden" if layer else "embedding"
            before = terms[name][1] if name in terms else 0.0
            terms[name] = getattr(config, name), before + total(jnp.mean(jnp.square(difference), axis=-1))
        if config.blocks:
            assert its is not None
            terms["blocks"] = config.blocks, total(block_distance(model, its, asked.segment_ids))
        if config.mixing or config.attention or config.relations:
            assert mine is not None
            assert its is not None
            every = tuple((i, i) for i in range(1, len(its)))
            relations = functools.partial(relation_divergence, kinds=config.relation_kinds, heads=config.relation_heads)
            for name, distance, pairs, given in (
                ("mixing", mixing_distance, every, its),  # both are given the teacher's stream
                ("attention", score_distance, self.layers, mine),
                ("relations", relations, self.layers[-1:], mine),
            ):
                if getattr(config, name):
                    apart = over_layers(distance, pairs, (model, given), (guide, its), asked.segment_ids)
                    terms[name] = getattr(config, name), total(apart)
        return weighed(config, model, student, asked, right, terms)

    def _project(self, index: int, x: jax.Array) -> jax.Array:
        """To the teacher's width, float32; as it is where the widths are one."""
        return (self.projections[index](x) if len(self.projections) else x).astype(jnp.float32)


def from_lessons(
    model: LanguageModel, batch: Batch, rng: jax.Array, *, config: DistillationConfig, ask: Asker, chunk: int
) -> Loss:
    """`Distillation` with `top_k` and no terms of hidden states, to rounding; no teacher is there.

    Args:
        model: the student.
        batch: with what the teacher said of it (`phyla.training.lessons`), `IDS` and `LOG_P`.
        rng: see `Asker`.
        config: which terms.
        ask: what the student is asked of a batch.
        chunk: tokens whose logits exist at one time, when the vocabulary is large.
    """
    asked, model = ask(batch, rng), model.moved()
    student = model.forward(asked.tokens, segment_ids=asked.segment_ids)

    def of_logits(hidden_BxCxD: jax.Array, answers_BxC: jax.Array, ids_BxCxk: jax.Array, log_p_BxCxn: jax.Array):
        logits = model.logits(hidden_BxCxD)
        log_q_BxCxn = with_rest(jax.nn.log_softmax(logits / config.temperature), ids_BxCxk)
        soft = config.temperature**2 * between(log_p_BxCxn, log_q_BxCxn, config.divergence)
        return negative_log_likelihood(logits, answers_BxC), soft

    given = student.hidden, asked.answers, batch[IDS], batch[LOG_P]
    right, soft = in_chunks(of_logits, given, chunk=logits_chunk(model, asked, chunk))
    terms = {"soft": (config.soft, jnp.sum(soft * asked.weights))}
    return weighed(config, model, student, asked, right, terms)


def likeliest(logits: jax.Array, *, temperature: float, top_k: int) -> tuple[jax.Array, jax.Array]:
    """What a teacher's lesson is: its likeliest ids, int32 [..., k], and `with_rest` of softmax(logits / T)."""
    chosen = jax.lax.top_k(logits, top_k)[1]
    return chosen, with_rest(jax.nn.log_softmax(logits / temperature), chosen)


def logits_chunk(model: LanguageModel, asked: Questions, chunk: int) -> int:
    """How many tokens' logits exist at one time: as `objectives.cross_entropy` decides."""
    vocabulary = model.config.vocab_size
    assert vocabulary is not None
    return chunk if vocabulary > 8 * model.config.width else asked.tokens.size


def weighed(
    config: DistillationConfig,
    model: LanguageModel,
    student: Output,
    asked: Questions,
    right: jax.Array,
    terms: dict[str, tuple[float, jax.Array]],
) -> Loss:
    """The loss of terms with their weights, and of the right tokens' cross-entropy, [B, T]."""
    weight, hard = jnp.sum(asked.weights), jnp.sum(right * asked.weights)
    if not config.hard:
        hard = jax.lax.stop_gradient(hard)  # it is reported alone: else zeros would be led back through the student
    penalty, metrics = auxiliary_losses(model.config, student.routing)
    penalty = penalty * weight + sum(factor * term for factor, term in terms.values())
    if config.hard != 1:
        penalty += (config.hard - 1) * hard
    metrics = {name: value * weight for name, value in metrics.items()}
    return Loss(hard, weight, metrics | {name: term for name, (_, term) in terms.items()}, penalty)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., D] twice to float32 [...]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def make_distillation(experiment: Experiment, teacher: LanguageModel, mask_id: int) -> Objective:
    """What an experiment with a teacher minimises.

    Args:
        experiment: the student's, with its vocabulary.
        teacher: a model of the same vocabulary; of one whose lessons are kept only the shapes are wanted.
        mask_id: the tokenizer's mask, for the masked-token objective.

    Raises UserError if the two do not fit.
    """
    model, loop, config = experiment.model, experiment.loop, experiment.distillation
    if model.vocab_size != teacher.config.vocab_size:
        raise UserError(f"model.vocab_size {model.vocab_size} is not the teacher's {teacher.config.vocab_size}")
    assert model.vocab_size is not None
    if (config.top_k or 0) >= model.vocab_size:
        raise UserError(f"distillation.top_k must be below model.vocab_size {model.vocab_size}, not {config.top_k}")
    if config.blocks and model.groups not in (None, model.repeats):
        raise UserError("distillation.blocks is not for layers that share parameters (model.groups)")
    ask = make_asker(experiment, mask_id)
    if config.cache is not None:
        return functools.partial(from_lessons, config=config, ask=ask, chunk=loop.loss_chunk)
    return Distillation(config, teacher, model, ask, chunk=loop.loss_chunk, rngs=nnx.Rngs(loop.seed))
