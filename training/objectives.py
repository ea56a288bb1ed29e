"""Objectives: `objective(model, batch, rng) -> (loss_sum, weight_sum, metrics)`.

The loop knows none of them by name; the loss is Σ loss_sum / Σ weight_sum over microbatches and devices, exactly.
`metrics` are sums over the same weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from phyla.models.language_model import LanguageModel

Batch = dict[str, jax.Array]
Objective = Callable[[LanguageModel, Batch, jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def next_token(
    model: LanguageModel, batch: Batch, rng: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the next token of the same document, in nats.

    Args:
        model: the model.
        batch: `tokens` and `segment_ids`, integers [B, T + 1]; segment 0 is padding.
        rng: unused.
        chunk: tokens whose logits exist at one time.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden_BxTxD, _ = model(tokens[:, :-1], segment_ids=segment_ids[:, :-1])
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    weights_BxT = same.astype(jnp.float32)
    loss_BxT = cross_entropy(model.logits, hidden_BxTxD, tokens[:, 1:], chunk=chunk)
    return jnp.sum(loss_BxT * weights_BxT), jnp.sum(weights_BxT), {}


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
        logits_BxCxV = logits(hidden_BxCxD)
        target_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BxCxV, axis=-1) - target_BxC

    B, T, D = hidden.shape
    vocabulary = jax.eval_shape(logits, jax.ShapeDtypeStruct((1, D), hidden.dtype)).shape[-1]
    size = max(1, chunk // B)
    if vocabulary <= 8 * D or size >= T:
        return loss(hidden, targets)
    # Chunks divide the time axis, so that a batch divided over devices stays so.
    chunks = -(-T // size)
    hidden = jnp.pad(hidden, ((0, 0), (0, chunks * size - T), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, chunks * size - T)))
    split = functools.partial(jnp.split, indices_or_sections=chunks, axis=1)
    parts = jnp.stack(split(hidden)), jnp.stack(split(targets))
    loss_CxBxS = jax.lax.map(jax.checkpoint(lambda part: loss(*part)), parts)
    return jnp.moveaxis(loss_CxBxS, 0, 1).reshape(B, chunks * size)[:, :T]
