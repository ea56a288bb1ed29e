"""What a student can learn from the inside of its teacher: what blocks give, how mixers mix, what attention compares.

All of it is computed again from the residual streams, [L + 1, B, T, D], so that the models keep nothing for it. The
results are float32 [B, T].
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phyla.models.block import Block
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError, check_divides
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import Attention, AttentionConfig
from phyla.training.config import DistillationConfig

Pairs = tuple[tuple[int, int], ...]
"""(layer of the student, layer of the teacher), from 1."""
Inside = tuple[Block, jax.Array]
"""A block, and the residual stream before it."""


def layer_pairs(config: DistillationConfig, student: int, teacher: int) -> Pairs:
    """(layer of the student, layer of the teacher) that are compared, from 1.

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


def check(config: DistillationConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises UserError, before anything is computed, if a term of the inside does not fit the two."""
    for name in ("blocks", "mixing"):
        if getattr(config, name):
            _check_same_shape(name, student, teacher)
    if config.mixing:
        for layer, (mine, its) in enumerate(zip(student.blocks, teacher.blocks, strict=True), 1):
            heads = mine.mixer.mixing_heads(student), its.mixer.mixing_heads(teacher)
            for who, mixer, count in zip(("student", "teacher"), (mine.mixer, its.mixer), heads, strict=True):
                if count is None:
                    kind = type(mixer).__name__.removesuffix("Config")
                    raise UserError(
                        f"distillation.mixing: {kind} (layer {layer} of the {who}) has no mixing matrix for each head"
                    )
            if heads[0] != heads[1]:
                where = f"{heads[1]} in layer {layer}, not {heads[0]}"
                raise UserError(f"distillation.mixing needs the teacher's number of heads: {where}")
    if config.attention or config.relations:
        pairs = layer_pairs(config, student.layers, teacher.layers)
        if config.attention:
            for pair in pairs:
                _check_heads("attention", *_attentions("attention", pair, student, teacher), "")
        if config.relations:
            mine, its = _attentions("relations", pairs[-1], student, teacher)
            if config.relation_heads is None:
                _check_heads("relations", mine, its, ", or distillation.relation_heads")
            for mixer, model in ((mine, student), (its, teacher)):
                width = mixer.heads * mixer.resolved_head_dim(model)
                if config.relation_heads:
                    check_divides("distillation.relation_heads", config.relation_heads, "the width of all heads", width)


def _check_same_shape(name: str, student: ModelConfig, teacher: ModelConfig) -> None:
    same, its = (student.width, student.layers), (teacher.width, teacher.layers)
    if same != its:
        raise UserError(
            f"distillation.{name} needs the teacher's width and layers: model.width {its[0]} and model.layers "
            f"{its[1]}, not {same[0]} and {same[1]}"
        )


def _attentions(
    name: str, pair: tuple[int, int], student: ModelConfig, teacher: ModelConfig
) -> tuple[AttentionConfig, AttentionConfig]:
    found = []
    for who, layer, model in zip(("student", "teacher"), pair, (student, teacher), strict=True):
        mixer = model.blocks[layer - 1].mixer
        if not isinstance(mixer, AttentionConfig):
            raise UserError(
                f"distillation.{name} is between layers of attention; layer {layer} of the {who} has none "
                "(distillation.mixing compares other mixers with attention)"
            )
        found.append(mixer)
    return found[0], found[1]


def _check_heads(name: str, mine: AttentionConfig, its: AttentionConfig, otherwise: str) -> None:
    if mine.heads != its.heads:
        raise UserError(
            f"distillation.{name} needs the teacher's number of heads, {its.heads}, not {mine.heads}{otherwise}"
        )


def block_distance(model: LanguageModel, streams: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The mean over the width of (block(x) - y)², summed over blocks (Bick et al. 2024, section 3.2).

    Each block is given the teacher's input to that layer, so that the errors of those before it do not add up.

    Args:
        model: the student.
        streams: the teacher's residual stream.
        segment_ids: [B, T].
    """
    value, distance = None, jnp.zeros(segment_ids.shape)

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
    return model.scan(body, (value, distance), given)[0][1]


def over_layers(
    distance: Callable[[Inside, Inside, jax.Array], jax.Array],
    pairs: Pairs,
    mine: tuple[LanguageModel, jax.Array],
    its: tuple[LanguageModel, jax.Array],
    segment_ids: jax.Array,
) -> jax.Array:
    """Σ `distance` over pairs of layers.

    Pairs at the same two places of the patterns are scanned, so that compile time does not grow with depth. What a
    distance makes exists for one pair at a time, in the backward pass too.

    Args:
        distance: of a layer of the student, one of the teacher, and segment_ids: `mixing_distance`, `score_distance`.
        pairs: see `layer_pairs`.
        mine: the student, and the residual stream that its layers are given.
        its: the teacher, and the same.
        segment_ids: [B, T].
    """
    (student, stream), (teacher, wanted) = mine, its
    places = collections.defaultdict(list)
    for i, j in pairs:
        places[student.place(i - 1), teacher.place(j - 1)].append((i - 1, j - 1))

    @jax.checkpoint
    def body(total: jax.Array, inside: tuple[Inside, Inside]) -> tuple[jax.Array, None]:
        return total + distance(*inside, segment_ids), None

    total = jnp.zeros(segment_ids.shape)
    for found in places.values():
        i, j = (list(layers) for layers in zip(*found, strict=True))
        inside = (student.blocks(i), stream[np.array(i)]), (teacher.blocks(j), wanted[np.array(j)])
        total, _ = jax.lax.scan(body, total, inside)
    return total


def mixing_distance(mine: Inside, its: Inside, segment_ids: jax.Array) -> jax.Array:
    """‖M - M'‖² of each row, a mean over heads (Bick et al. 2024, section 3.1).

    Of whole matrices the sum over rows is the squared Frobenius norm.

    Args:
        mine: the student's block and what it is given, which is what the teacher's is given.
        its: the teacher's.
        segment_ids: [B, T].
    """
    mixed, wanted = (block.mixer.mixing(block.mixer_input(x), segment_ids) for block, x in (mine, its))
    return jnp.mean(jnp.sum(jnp.square(mixed - jax.lax.stop_gradient(wanted)), -1), axis=1)


def score_distance(mine: Inside, its: Inside, segment_ids: jax.Array) -> jax.Array:
    """(scores - scores')² of attention before the softmax, a mean over heads and the tokens that are seen.

    Jiao et al. 2020 (TinyBERT), equation 7, where tokens that are not seen count as equal.

    Args:
        mine: the student's block and the residual stream before it.
        its: the teacher's.
        segment_ids: [B, T].
    """
    (a, x), (b, y) = (_attention(*each) for each in (mine, its))
    seen = (a.seen(x, segment_ids) & b.seen(y, segment_ids))[:, None]
    difference = jnp.where(seen, a.scores(x, segment_ids) - jax.lax.stop_gradient(b.scores(y, segment_ids)), 0)
    return jnp.mean(jnp.sum(jnp.square(difference), -1) / jnp.sum(seen, -1), axis=1)


def relation_divergence(
    mine: Inside,
    its: Inside,
    segment_ids: jax.Array,
    *,
    kinds: Sequence[str],
    heads: int | None,
) -> jax.Array:
    """Σ over kinds of KL(teacher's relation, student's), a mean over heads.

    A relation is the softmax of a·b / √(size of a head) over the tokens that attention sees. Wang et al. 2020 (MiniLM),
    equations 4 to 7: qk, which is attention, and vv. Wang et al. 2021 (MiniLMv2): other kinds, and heads of another
    number than attention's.

    Args:
        mine: the student's block and the residual stream before it.
        its: the teacher's.
        segment_ids: [B, T].
        kinds: qk, vv, qq, kk.
        heads: into how many the concatenation of all is divided; None: attention's own.
    """
    (a, x), (b, y) = (_attention(*each) for each in (mine, its))
    seen = (a.seen(x, segment_ids) & b.seen(y, segment_ids))[:, None]
    total = jnp.zeros(segment_ids.shape)
    for kind in kinds:
        log_q, log_p = (
            jax.nn.log_softmax(jnp.where(seen, _relation(*each, segment_ids, kind, heads), -1e30), axis=-1)
            for each in ((a, x), (b, y))
        )
        log_p = jax.lax.stop_gradient(log_p)
        terms = jnp.where(seen, jnp.exp(log_p) * (log_p - log_q), 0)
        total += jnp.mean(jnp.sum(terms, axis=-1), axis=1)
    return total


def _relation(attention: Attention, x: jax.Array, segment_ids: jax.Array, kind: str, heads: int | None) -> jax.Array:
    """Before the softmax, float32 [B, N, T, T]."""
    if kind == "qk" and heads is None:
        return attention.scores(x, segment_ids)
    parts = dict(zip("qkv", attention.projected(x, segment_ids), strict=True))
    left, right = (parts[name].astype(jnp.float32) for name in kind)
    if heads is not None:
        left, right = (part.reshape(*part.shape[:2], heads, -1) for part in (left, right))
    return jnp.einsum("btnh,bsnh->bnts", left, right) * left.shape[-1] ** -0.5


def _attention(block: Block, stream: jax.Array) -> tuple[Any, jax.Array]:
    return block.mixer, block.mixer_input(stream)
