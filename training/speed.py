"""How fast a trained model reads and writes, and what it remembers, at several context lengths."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from phyla.models.language_model import LanguageModel
from phyla.training.generate import BLOCK, Generator, Sampling
from phyla.training.saved import Saved

CONTEXTS = (256, 1024, 4096)
REPEATS = 3


def measure(
    saved: Saved, progress: Callable[[int], None] = lambda done: None, contexts: Sequence[int] | None = None
) -> dict[str, list[float]]:
    """Prefill and greedy decode tokens per second (batch 1, medians) and bytes of state at each context.

    Contexts (None: `CONTEXTS`) that a model is too short for are left out.
    """
    generator = Generator(saved.graphdef, Sampling(temperature=0))
    longest = saved.experiment.model.learned_positions or math.inf
    contexts = [length for length in contexts or CONTEXTS if length + (REPEATS + 1) * BLOCK <= longest]
    record: dict[str, list[float]] = {
        "contexts": list(contexts),
        "prefill_tokens_per_second": [],
        "decode_tokens_per_second": [],
        "state_bytes": [],
    }
    key, vocabulary, begins = jax.random.key(0), saved.experiment.model.vocab_size, saved.model().beginning is not None
    assert vocabulary is not None
    for i, length in enumerate(contexts):
        tokens = jax.random.randint(key, (1, length), 0, vocabulary)
        segment_ids = None if begins else jnp.ones_like(tokens)
        room = length + (REPEATS + 1) * BLOCK

        def prefill(tokens: jax.Array = tokens, segment_ids: jax.Array | None = segment_ids, room: int = room) -> Any:
            return generator.prefill(saved.params, tokens, segment_ids, key, length=room)

        decoder = _timed(prefill)[0]
        record["prefill_tokens_per_second"].append(
            length / statistics.median(_timed(prefill)[1] for _ in range(REPEATS))
        )
        seconds = []
        for _ in range(REPEATS + 1):
            (decoder, _), spent = _timed(generator.decode, saved.params, decoder, count=BLOCK)
            seconds.append(spent)
        record["decode_tokens_per_second"].append(BLOCK / statistics.median(seconds[1:]))
        record["state_bytes"].append(state_bytes(saved.model(), length))
        progress(i + 1)
    return record


def state_bytes(model: LanguageModel, length: int) -> int:
    """Of one sequence's state after `length` tokens."""
    state = jax.eval_shape(lambda: model.initial_state(1, length))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*args, **kwargs))
    return result, time.perf_counter() - begin
