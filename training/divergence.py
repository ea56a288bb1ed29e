"""How far the predictions of models are from another's, on a whole text."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from phyla.models.documents import apart
from phyla.models.language_model import LanguageModel, ModelState
from phyla.training import sharding
from phyla.training.data.pipeline import Packed
from phyla.training.evaluate import bits_per_byte
from phyla.training.objectives import Asker, Batch


class Divergence(NamedTuple):
    """Of a model from the original, on a text."""

    bits_per_byte: float
    """The model's own loss."""
    kl: float
    """Mean over tokens of KL(original ‖ model), nats."""
    agreement: float
    """Share of the tokens for which both have the same likeliest answer."""


def divergences(
    models: Sequence[LanguageModel],
    ask: Asker,
    packed: Packed,
    *,
    batch_size: int,
    chunk: int,
    mesh: Mesh,
    call: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Divergence]:
    """Compares each model with the first, on every row of a packed text.

    Args:
        models: of one vocabulary; the first is the original.
        ask: what is asked of them.
        packed: the text.
        batch_size: sequences at a time.
        chunk: tokens whose logits, of two models, exist at one time.
        mesh: where the batches go.
        call: tokens of a row that a model reads at a time, going on from the state that those before left; None: all.
        progress: called with the number of batches done.
    """
    graphdefs, params = zip(*(nnx.split(model) for model in models), strict=True)

    @jax.jit
    def sums(params: tuple[nnx.State, ...], batch: Batch) -> jax.Array:
        asked = ask(batch, jax.random.key(0))
        networks = [nnx.merge(graphdef, of_one).moved() for graphdef, of_one in zip(graphdefs, params, strict=True)]
        hidden = tuple(_hidden(each, asked.tokens, asked.segment_ids, call) for each in networks)

        def of_chunk(part: tuple) -> jax.Array:
            hidden, answers_C, weights_C = part
            p_CxV = jax.nn.log_softmax(networks[0].logits(hidden[0]))
            found = []
            for network, hidden_CxD in zip(networks, hidden, strict=True):
                q_CxV = jax.nn.log_softmax(network.logits(hidden_CxD))
                loss_C = -jnp.take_along_axis(q_CxV, answers_C[:, None], axis=-1)[:, 0]
                kl_C = jnp.sum(jnp.exp(p_CxV) * (p_CxV - q_CxV), axis=-1)
                same_C = jnp.argmax(p_CxV, axis=-1) == jnp.argmax(q_CxV, axis=-1)
                found.append(weights_C @ jnp.stack([loss_C, kl_C, same_C, jnp.ones_like(loss_C)], axis=-1))
            return jnp.stack(found)

        def chunks(x: jax.Array) -> jax.Array:
            flat = x.reshape(asked.tokens.size, *x.shape[2:])
            padded = jnp.pad(flat, [(0, -len(flat) % chunk), *[(0, 0)] * (flat.ndim - 1)])
            return padded.reshape(-1, chunk, *flat.shape[1:])

        parts = jax.tree.map(chunks, (hidden, asked.answers, asked.weights))
        return jnp.sum(jax.lax.map(of_chunk, parts), axis=0)

    totals = []
    for i, batch in enumerate(packed.batches(batch_size)):
        with jax.set_mesh(mesh):
            totals.append(sums(params, sharding.put_batch(batch, mesh)))
        if i:
            jax.block_until_ready(totals[i - 1])  # at most two batches in flight
        progress(i + 1)
    total = np.asarray(jax.device_get(totals), np.float64).sum(axis=0)
    means = total[:, :3] / total[:, 3:]
    return [Divergence(bits_per_byte(float(loss), packed), float(kl), float(same)) for loss, kl, same in means]


def _hidden(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array, call: int | None) -> jax.Array:
    """[B, T, D]; see `divergences`."""
    if call is None:
        return model.forward(tokens, segment_ids=segment_ids).hidden
    if model.beginning is None:
        return _in_calls(model, tokens, segment_ids, call)
    graphdef, params = nnx.split(model)

    def run(params: nnx.State, tokens: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, None]:
        return _in_calls(nnx.merge(graphdef, params), tokens, None, call), None

    return apart(run, params, tokens, segment_ids)[0]


def _in_calls(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array | None, call: int) -> jax.Array:
    B, T = tokens.shape

    def calls(x_BxT: jax.Array) -> jax.Array:
        """[calls, B, call], padded at the end, which no token before sees."""
        return jnp.pad(x_BxT, ((0, 0), (0, -T % call))).reshape(B, -1, call).swapaxes(0, 1)

    def one(state: ModelState, given: tuple[jax.Array, jax.Array | None]) -> tuple[ModelState, jax.Array]:
        hidden, state = model(given[0], state, given[1])
        return state, hidden

    state = model.initial_state(B, T + -T % call)
    _, hidden_NxBxCxD = jax.lax.scan(one, state, jax.tree.map(calls, (tokens, segment_ids)))
    return hidden_NxBxCxD.swapaxes(0, 1).reshape(B, -1, hidden_NxBxCxD.shape[-1])[:, :T]
