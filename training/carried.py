"""What a state costs: its bytes, and how well a model predicts with what it carries from call to call.

A forward pass over a whole row never reads a stored state. Here rows are read in calls of a few tokens, each going on
from the state that the one before left: with one token a call, as in decoding, a state is rounded most often.
"""

from collections.abc import Sequence
from typing import Any

from phyla.compression.state import is_held
from phyla.models.language_model import LanguageModel
from phyla.training.data.pipeline import prepare
from phyla.training.divergence import divergences
from phyla.training.progress import Reporter
from phyla.training.saved import Saved, make_asker
from phyla.training.speed import state_bytes

CALLS = (64, 1)
"""Tokens a call."""
TOKENS = 4_096
"""Of the validation text, at most."""
CONTEXT = 1_024
"""Tokens after which the state is measured."""
TABLE = {
    "state_bytes": (f"state of {CONTEXT:,} tokens", "{:,} bytes"),
    "carried_64": ("bits per byte, 64 tokens a call", "{:.4f}"),
    "carried_1": ("1 token a call", "{:.4f}"),
    "carried_kl": ("KL at 1 token", "{:.6f} nats"),
}
"""The columns, for `phyla compress`."""


def compare(
    saved: Saved, models: Sequence[LanguageModel], rows: Sequence[dict[str, Any]], max_tokens: int | None
) -> None:
    """Puts into each row what its model's state costs, if a model of them has 8 bits for it.

    Args:
        saved: the run, for its text; one without a tokenizer has none.
        models: the first is the original.
        rows: one for each model.
        max_tokens: of the text; None, or more: `TOKENS`.
    """
    if not any(map(is_held, models)):
        return
    for row, model in zip(rows, models, strict=True):
        row["state_bytes"] = state_bytes(model, CONTEXT)
    if saved.own_tokenizer is None:
        return
    packed = prepare(saved.experiment.data, saved.tokenizer, "validation", min(TOKENS, max_tokens or TOKENS))
    loop = saved.experiment.loop
    options: dict[str, Any] = {"batch_size": loop.batch_size, "chunk": loop.loss_chunk, "mesh": saved.mesh}
    ask = make_asker(saved.experiment, saved.tokenizer.mask_id)
    with Reporter() as reporter, reporter.task("carry the state", len(CALLS), "passes") as task:
        for i, call in enumerate(CALLS):
            for row, each in zip(rows, divergences(models, ask, packed, **options, call=call), strict=True):
                row |= {f"carried_{call}": each.bits_per_byte, "carried_kl": each.kl}
            task.update(i + 1)
