"""What a run's model responds to conversations, greedily: for exact matches and for the protocols."""

from collections.abc import Callable, Sequence

import numpy as np

from phyla.models.errors import UserError
from phyla.training.data.tokenizers import Tokenizer
from phyla.training.generate import Generator, Sampling, generate
from phyla.training.saved import Saved

GREEDY = Sampling(temperature=0)


def respond(
    saved: Saved,
    prompts: Sequence[np.ndarray],
    *,
    end_id: int,
    stop: Sequence[str] = (),
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[str, bool]]:
    """The most likely continuation of each prompt, in batches of the run's size that are compiled once.

    Args:
        saved: the run.
        prompts: tokens.
        end_id: ends a response, as the end of a document does.
        stop: texts that end a response.
        max_tokens: of a response.
        progress: called with the number of prompts done.

    Returns:
        The text before its end, and whether it came to one.

    Raises UserError if a prompt and its response exceed the positions that the model has learned.
    """
    if not prompts:
        return []
    width, positions = max(map(len, prompts)), saved.experiment.model.learned_positions
    if positions and width + max_tokens > positions:
        raise UserError(
            f"prompts of up to {width} tokens and max-tokens {max_tokens} together must not exceed "
            f"model.learned_positions {positions}"
        )
    size = min(saved.experiment.loop.batch_size, len(prompts))
    generator, found = Generator(saved.graphdef, GREEDY), []

    def text(row: int, tokens: np.ndarray) -> tuple[str, bool]:
        return until(saved.tokenizer, tokens, end_id, stop)

    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        drawn = generate(
            saved.graphdef,
            saved.params,
            [*some, *[some[-1]] * (size - len(some))],
            max_tokens=max_tokens,
            sampling=GREEDY,
            finished=lambda row, tokens: text(row, tokens)[1],
            generator=generator,
            width=width,
        )
        found += [text(row, drawn[row]) for row in range(len(some))]
        progress(len(found))
    return found


def until(tokenizer: Tokenizer, tokens: np.ndarray, end_id: int, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first end, and whether there is one."""
    ends = np.flatnonzero((tokens == end_id) | (tokens == tokenizer.eos_id))
    text = tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)
    cut = min((text.index(each) for each in stop if each in text), default=len(text))
    return text[:cut], bool(len(ends)) or cut < len(text)
