"""Distillation as an objective: a student learns from a frozen teacher's distribution and its hidden states.

The teacher is part of the objective, so that the one loop trains the student, and the learned projections between
their widths, and neither changes nor saves the teacher.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.layers import Linear
from phyla.models.moe import auxiliary_losses
from phyla.models.weights import freeze
from phyla.training.config import DistillationConfig, Experiment
from phyla.training.objectives import Asker, Batch, Loss, in_chunks, negative_log_likelihood
from phyla.training.saved import make_asker


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
        log_q, log_p = _with_rest(log_q, chosen), _with_rest(log_p, chosen)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "forward-kl":
        terms = p * (log_p - log_q)
    elif kind == "reverse-kl":
        terms = q * (log_q - log_p)
    else:
        log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        terms = (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    return temperature**2 * jnp.sum(terms, axis=-1)


def _with_rest(log_p: jax.Array, chosen: jax.Array) -> jax.Array:
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
        student_width: int,
        student_layers: int,
        ask: Asker,
        *,
        chunk: int,
        rngs: nnx.Rngs,
    ):
        """Of a teacher, which is frozen.

        Args:
            config: which terms.
            teacher: a model; its parameters are marked as not trainable.
            student_width: D of the student.
            student_layers: how many it has.
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
        self.pairs = layer_pairs(config, student_layers, teacher.config.layers) if config.hidden else ()
        if config.embedding:
            self.pairs = ((0, 0), *self.pairs)
        count = len(self.pairs) + bool(config.cosine)
        differ = student_width != teacher.config.width
        if config.blocks:
            _check_blocks(student_width, student_layers, teacher)
        widths = student_width, teacher.config.width
        axes = "embed", "embed_out"
        self.projections = nnx.List([Linear(widths, axes, rngs) for _ in range(count)] if differ else [])

    def __call__(self, model: LanguageModel, batch: Batch, rng: jax.Array) -> Loss:
        """See `phyla.training.objectives`; the metrics are the terms without their weights."""
        config = self.config
        asked = self.ask(batch, rng)
        every_layer = bool(self.pairs or config.blocks)
        student = model.forward(asked.tokens, segment_ids=asked.segment_ids, layers=every_layer)
        teacher = self.teacher.forward(asked.tokens, segment_ids=asked.segment_ids, layers=every_layer)
        teacher = jax.tree.map(jax.lax.stop_gradient, teacher)

        def of_logits(student_BxCxD: jax.Array, teacher_BxCxD: jax.Array, answers_BxC: jax.Array):
            logits = model.logits(student_BxCxD)
            right = negative_log_likelihood(logits, answers_BxC)
            if not config.soft:
                return right, jnp.zeros_like(right)
            softly = jax.lax.stop_gradient(self.teacher.logits(teacher_BxCxD))
            kind, temperature = config.divergence, config.temperature
            return right, divergence(logits, softly, kind=kind, temperature=temperature, top_k=config.top_k)

        vocabulary, width = model.config.vocab_size, model.config.width
        assert vocabulary is not None
        chunk = self.chunk if vocabulary > 8 * width else asked.tokens.size
        right, soft = in_chunks(of_logits, (student.hidden, teacher.hidden, asked.answers), chunk=chunk)

        def total(x_BxT: jax.Array) -> jax.Array:
            return jnp.sum(x_BxT * asked.weights)

        terms: dict[str, tuple[float, jax.Array]] = {}
        if config.soft:
            terms["soft"] = config.soft, total(soft)
        if config.cosine:
            mapped = self._project(-1, student.hidden)
            terms["cosine"] = config.cosine, total(1 - cosine(mapped, teacher.hidden))
        for i, (mine, its) in enumerate(self.pairs):
            assert student.layers is not None
            assert teacher.layers is not None
            difference = self._project(i, student.layers[mine]) - teacher.layers[its]
            name = "hidden" if mine else "embedding"
            before = terms[name][1] if name in terms else 0.0
            terms[name] = getattr(config, name), before + total(jnp.mean(jnp.square(difference), axis=-1))
        if config.blocks:
            terms["blocks"] = config.blocks, total(block_distance(model, teacher.layers, asked.segment_ids))

        weight, hard = jnp.sum(asked.weights), total(right)
        penalty, metrics = auxiliary_losses(model.config, student.routing)
        penalty = penalty * weight + sum(factor * term for factor, term in terms.values())
        if config.hard != 1:
            penalty += (config.hard - 1) * hard
        metrics = {name: value * weight for name, value in metrics.items()}
        return Loss(hard, weight, metrics | {name: term for name, (_, term) in terms.items()}, penalty)

    def _project(self, index: int, x: jax.Array) -> jax.Array:
        """To the teacher's width, float32; as it is where the widths are one."""
        return (self.projections[index](x) if len(self.projections) else x).astype(jnp.float32)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., D] twice to float32 [...]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def layer_pairs(config: DistillationConfig, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(layer of the student, layer of the teacher) whose outputs are compared, from 1.

    Args:
        config: `layers`, or evenly spaced as in TinyBERT.
        student: how many layers it has.
        teacher: how many it has.

    Raises UserError if `layers` does not name one of the teacher's layers for each of the student's.
    """
    layers = config.layers or tuple(max(1, (i + 1) * teacher // student) for i in range(student))
    if len(layers) != student:
        raise UserError(f"distillation.layers must name {student} layers, one for each of the student's: {layers}")
    wrong = [layer for layer in layers if not 1 <= layer <= teacher]
    if wrong:
        raise UserError(f"distillation.layers has {wrong[0]}, but the teacher's layers are 1 to {teacher}")
    return tuple((i + 1, layer) for i, layer in enumerate(layers))


def block_distance(model: LanguageModel, streams: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The mean over the width of (block(x) - y)², summed over blocks (Bick et al. 2024, section 3.2), float32 [B, T].

    Each block is given the teacher's input to that layer, so that the errors of those before it do not add up.

    Args:
        model: the student.
        streams: the teacher's residual stream [L + 1, B, T, D].
        segment_ids: [B, T].
    """
    model, value, distance = model.moved(), None, jnp.zeros(segment_ids.shape)

    def squared(y: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(y - wanted), axis=-1)

    first = len(model.prefix)
    for i, block in enumerate(model.prefix):
        y, value, _, _ = block(streams[i], value, None, segment_ids)
        distance += squared(y, streams[i + 1])

    def body(carry, period_and_streams):
        value, distance = carry
        period, (x_PxBxTxD, wanted_PxBxTxD) = period_and_streams
        now = value
        for block, x, wanted in zip(period.blocks, x_PxBxTxD, wanted_PxBxTxD, strict=True):
            y, now, _, _ = block(x, now if value is not None else None, None, segment_ids)
            distance += squared(y, wanted)
        return (value, distance), None

    fold = lambda x: x.reshape(-1, len(model.config.pattern), *x.shape[1:])  # noqa: E731
    given = fold(streams[first:-1]), fold(streams[first + 1 :])
    return jax.lax.scan(body, (value, distance), (model.periods, given))[0][1]


def make_distillation(experiment: Experiment, teacher: LanguageModel, mask_id: int) -> Distillation:
    """What an experiment with a teacher minimises.

    Args:
        experiment: the student's, with its vocabulary.
        teacher: a model of the same vocabulary.
        mask_id: the tokenizer's mask, for the masked-token objective.

    Raises UserError if the two do not fit.
    """
    model, loop = experiment.model, experiment.loop
    if model.vocab_size != teacher.config.vocab_size:
        raise UserError(f"model.vocab_size {model.vocab_size} is not the teacher's {teacher.config.vocab_size}")
    assert model.vocab_size is not None
    if (experiment.distillation.top_k or 0) >= model.vocab_size:
        top_k = experiment.distillation.top_k
        raise UserError(f"distillation.top_k must be below model.vocab_size {model.vocab_size}, not {top_k}")
    if experiment.distillation.blocks and model.groups not in (None, model.repeats):
        raise UserError("distillation.blocks is not for layers that share parameters (model.groups)")
    ask = make_asker(experiment, mask_id)
    rngs = nnx.Rngs(loop.seed)
    return Distillation(
        experiment.distillation, teacher, model.width, model.layers, ask, chunk=loop.loss_chunk, rngs=rngs
    )


def _check_blocks(width: int, layers: int, teacher: LanguageModel) -> None:
    same = width, layers
    its = teacher.config.width, teacher.config.layers
    if same != its:
        raise UserError(
            f"distillation.blocks needs the teacher's width and layers: model.width {its[0]} and model.layers "
            f"{its[1]}, not {width} and {layers}"
        )
