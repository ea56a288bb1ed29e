"""Objectives: `objective(model, batch, rng) -> Loss`.

The loop knows none of them by name; the loss is Σ total / Σ weight over microbatches and devices, exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phyla.models.language_model import LanguageModel
from phyla.models.moe import auxiliary_losses

Batch = dict[str, jax.Array]


class Loss(NamedTuple):
    """Of a batch: sums over the same weights, [] float32 each. Training minimises total + penalty."""

    total: jax.Array  # what is reported, in training and in evaluation alike
    weight: jax.Array
    metrics: dict[str, jax.Array]
    penalty: jax.Array | float = 0.0  # minimised besides: how evenly experts are used, not how well text is predicted


Objective = Callable[[LanguageModel, Batch, jax.Array], Loss]


class Questions(NamedTuple):
    """What a model is asked of a batch, [B, T] each."""

    tokens: jax.Array  # that it sees
    segment_ids: jax.Array
    answers: jax.Array  # the right token at each position
    weights: jax.Array  # float32, 1 where it is asked


Asker = Callable[[Batch, jax.Array], Questions]
"""(batch, rng) -> Questions. A batch has `tokens` and `segment_ids`, integers [B, T + 1]; segment 0 is padding.

It may have `weights`, float32 [B, T + 1]: how much each token counts as a target; in conversations responses do.
"""


def next_tokens(batch: Batch, rng: jax.Array) -> Questions:
    """The next token of the same document, where it counts; `rng` is unused."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    weights = same.astype(jnp.float32)
    if "weights" in batch:
        weights *= batch["weights"][:, 1:]
    return Questions(tokens[:, :-1], segment_ids[:, :-1], tokens[:, 1:], weights)


def hidden_tokens(batch: Batch, rng: jax.Array, *, vocab_size: int, mask_id: int) -> Questions:
    """Of all tokens 15 %; of these 80 % are replaced by the mask, 10 % by a random token, and 10 % are left.

    Devlin et al. 2019, section 3.1. Each token is in just one row if the last of each is left out.
    """
    tokens, segment_ids = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    for_choice, for_fate, for_token = jax.random.split(rng, 3)
    chosen_BxT = jax.random.bernoulli(for_choice, 0.15, tokens.shape) & (segment_ids != 0)
    fate_BxT = jax.random.uniform(for_fate, tokens.shape)
    random_BxT = jax.random.randint(for_token, tokens.shape, 0, vocab_size)
    hidden_token_BxT = jnp.where(fate_BxT < 0.8, mask_id, jnp.where(fate_BxT < 0.9, random_BxT, tokens))
    seen_BxT = jnp.where(chosen_BxT, hidden_token_BxT, tokens)
    return Questions(seen_BxT, segment_ids, tokens, chosen_BxT.astype(jnp.float32))


def next_token(model: LanguageModel, batch: Batch, rng: jax.Array, *, chunk: int) -> Loss:
    """Cross-entropy of the next token of the same document, in nats; the penalty is `auxiliary_losses`.

    Args:
        model: the model.
        batch: see `Asker`.
        rng: unused.
        chunk: tokens whose logits exist at one time.
    """
    return _loss(model, next_tokens(batch, rng), chunk)


def masked_token(model: LanguageModel, batch: Batch, rng: jax.Array, *, chunk: int, mask_id: int) -> Loss:
    """Cross-entropy of `hidden_tokens`, in nats.

    Args:
        model: the model; bidirectional, to see both sides.
        batch: see `Asker`.
        rng: which tokens.
        chunk: tokens whose logits exist at one time.
        mask_id: the mask's token.
    """
    vocab_size = model.config.vocab_size
    assert vocab_size is not None
    return _loss(model, hidden_tokens(batch, rng, vocab_size=vocab_size, mask_id=mask_id), chunk)


def _loss(model: LanguageModel, asked: Questions, chunk: int) -> Loss:
    model = model.moved()  # once, not for each chunk of logits
    seen = model.forward(asked.tokens, segment_ids=asked.segment_ids)
    loss_BxT = cross_entropy(model.logits, seen.hidden, asked.answers, chunk=chunk)
    weight = jnp.sum(asked.weights)
    penalty, metrics = auxiliary_losses(model.config, seen.routing)  # means: times the weight, they are sums
    total = jnp.sum(loss_BxT * asked.weights)
    return Loss(total, weight, {k: v * weight for k, v in metrics.items()}, penalty * weight)


def cross_entropy(
    logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, *, chunk: int
) -> jax.Array:
    """-log softmax(logits(hidden))[targets] in float32, [B, T], without all logits at once.

    At most `chunk` tokens' logits exist at one time; the backward pass computes them again. A vocabulary so small
    that all logits take no more room than eight times the hidden vectors is not worth the recomputation.

    Args:
        logits: [..., D] -> float32 [..., V].
        hidden: [B, T, D].
        targets: integers [B, T].
        chunk: tokens.
    """

    def loss(hidden_BxCxD: jax.Array, targets_BxC: jax.Array) -> jax.Array:
        return negative_log_likelihood(logits(hidden_BxCxD), targets_BxC)

    vocabulary = jax.eval_shape(logits, jax.ShapeDtypeStruct((1, hidden.shape[-1]), hidden.dtype)).shape[-1]
    return in_chunks(loss, (hidden, targets), chunk=chunk if vocabulary > 8 * hidden.shape[-1] else hidden.size)


def in_chunks[T](of: Callable[..., T], arrays: tuple[jax.Array, ...], *, chunk: int) -> T:
    """`of(*arrays)`, at most `chunk` tokens at a time; the backward pass computes each part again.

    Args:
        of: from [B, C, ...] each to any number of [B, C, ...], for any C.
        arrays: [B, T, ...] each.
        chunk: tokens; where B · T is not more, nothing is divided or computed again.
    """
    B, T = arrays[0].shape[:2]
    size = max(1, chunk // B)
    if size >= T:
        return of(*arrays)
    # Chunks divide the time axis, so that a batch divided over devices stays so.
    chunks = -(-T // size)

    def parts(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, chunks * size - T), *((0, 0),) * (array.ndim - 2)))
        return jnp.stack(jnp.split(array, chunks, axis=1))

    of_parts = jax.lax.map(jax.checkpoint(lambda part: of(*part)), tuple(map(parts, arrays)))

    def whole(x_CxBxS: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_CxBxS, 0, 1).reshape(B, chunks * size, *x_CxBxS.shape[3:])[:, :T]

    return jax.tree.map(whole, of_parts)


@jax.custom_vjp
def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[targets]: [..., V] and integers [...] to [...]."""
    return _forward(logits, targets)[0]


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return total - chosen, (logits, targets, total)


def _backward(kept: tuple[jax.Array, ...], d_loss: jax.Array) -> tuple[jax.Array, None]:
    """(softmax - onehot) in one pass over the logits; autodiff scatters into an array of zeros as large as they are."""
    logits, targets, total = kept
    right = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - total[..., None]) - right) * d_loss[..., None], None


negative_log_likelihood.defvjp(_forward, _backward)
