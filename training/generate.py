"""Text from a model: compiled prefill and decoding, for a batch of prompts of different lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.rule import Rule

from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel, ModelState
from phyla.training import run
from phyla.training.data.tokenizers import encode_prompt
from phyla.training.progress import Reporter
from phyla.training.saved import load

BLOCK = 32
"""Tokens decoded between two looks at the stop strings."""

UNROLLED = 12
"""Layers, at most, of a model whose decoding is compiled layer by layer: see `LanguageModel.unrolled`."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: the filters apply in this order, each to what the one before left."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """The smallest set of tokens whose probability reaches p (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Only tokens at least p times as likely as the most likely one (Nguyen et al. 2024)."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k must be at least 1, not {self.top_k}")
        for name, value in (("top-p", self.top_p), ("min-p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, not {value}")


def sample(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token for each row, [B] int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BxV.shape[-1]:
        least_Bx1 = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    if sampling.top_p is not None:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        probability_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
        before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
        least_Bx1 = jnp.min(jnp.where(before_BxV < sampling.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    if sampling.min_p is not None:
        least_Bx1 = jnp.max(logits_BxV, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    return jax.random.categorical(key, logits_BxV).astype(jnp.int32)


class Decoder(NamedTuple):
    """What decoding goes on from."""

    state: ModelState
    token: jax.Array  # [B] int32, drawn and not yet fed
    drawn: jax.Array  # [] int32, how many tokens each row has drawn
    key: jax.Array


class Generator:
    """Compiled prefill and decoding of one model."""

    def __init__(self, graphdef: nnx.GraphDef, sampling: Sampling):
        def draw(model: LanguageModel, hidden_BxD: jax.Array, drawn: jax.Array, key: jax.Array) -> jax.Array:
            return sample(model.logits(hidden_BxD), jax.random.fold_in(key, drawn), sampling)

        def prefill(
            params: nnx.State, tokens_BxT: jax.Array, segment_ids_BxT: jax.Array | None, key: jax.Array, *, length: int
        ) -> Decoder:
            model: LanguageModel = nnx.merge(graphdef, params).moved()  # once, not for each token
            state = model.initial_state(len(tokens_BxT), length)
            hidden_BxTxD, state = model(tokens_BxT, state, segment_ids_BxT)
            zero = jnp.zeros((), jnp.int32)
            return Decoder(state, draw(model, hidden_BxTxD[:, -1], zero, key), zero + 1, key)

        def decode(params: nnx.State, decoder: Decoder, *, count: int) -> tuple[Decoder, jax.Array]:
            model: LanguageModel = nnx.merge(graphdef, params).moved()  # once, not for each token
            few = model.config.layers <= UNROLLED
            if few:
                decoder = decoder._replace(state=decoder.state.unrolled(model.config.repeats))
                model = model.unrolled()

            def one(decoder: Decoder, _: None) -> tuple[Decoder, jax.Array]:
                hidden_Bx1xD, state = model(decoder.token[:, None], decoder.state)
                token = draw(model, hidden_Bx1xD[:, 0], decoder.drawn, decoder.key)
                return Decoder(state, token, decoder.drawn + 1, decoder.key), decoder.token

            decoder, tokens_TxB = jax.lax.scan(one, decoder, length=count)
            if few:
                decoder = decoder._replace(state=decoder.state.stacked())
            return decoder, tokens_TxB.T

        self.prefill: Callable[..., Decoder] = jax.jit(prefill, static_argnames="length")
        """(params, tokens [B, T], segment_ids [B, T] or None, key, length) -> Decoder with room for `length` tokens."""
        self.decode: Callable[..., tuple[Decoder, jax.Array]] = jax.jit(
            decode, static_argnames="count", donate_argnums=1
        )
        """(params, decoder, count) -> the decoder after, and the tokens [B, count]."""


def left_pad(prompts: Sequence[np.ndarray], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array [B, T], T ≥ width, ending together; padding is segment 0, the prompts are segment 1."""
    length = max(width, *map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    return tokens, segment_ids


def generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    finished: Callable[[int, np.ndarray], bool] = lambda row, tokens: False,
    progress: Callable[[int], None] = lambda tokens: None,
    generator: Generator | None = None,
    width: int = 0,
) -> list[np.ndarray]:
    """Continues prompts.

    Args:
        graphdef: of a `LanguageModel`.
        params: its parameters.
        prompts: token ids, at least one each.
        max_tokens: drawn for each prompt.
        sampling: how.
        seed: of the draws.
        finished: asked of each row now and then, with the tokens drawn so far; decoding ends when all rows are.
        progress: called with the number of tokens drawn so far.
        generator: of this graph and sampling, to be compiled once for many calls; None: a new one.
        width: prompts are padded to at least so many tokens.

    Prompts to a model with a learned beginning, which is that of their first tokens and not of padding, are taken in
    turn: those of one length together.

    Returns:
        The drawn tokens of each prompt.
    """
    generator = generator or Generator(graphdef, sampling)
    length = max(width, *map(len, prompts)) + max_tokens + BLOCK
    begins = nnx.merge(graphdef, params).beginning is not None

    def continued(rows: Sequence[int], width: int) -> np.ndarray:
        tokens, segment_ids = left_pad([prompts[row] for row in rows], width)
        key = jax.random.key(seed)
        decoder = generator.prefill(params, tokens, None if begins else segment_ids, key, length=length)
        drawn = np.zeros((len(rows), 0), np.int32)
        while drawn.shape[1] < max_tokens and not all(map(finished, rows, drawn)):
            decoder, block = generator.decode(params, decoder, count=BLOCK)
            drawn = np.concatenate([drawn, np.asarray(block)], axis=1)[:, :max_tokens]
            progress(drawn.shape[1])
        return drawn

    if not begins:
        return list(continued(range(len(prompts)), width))
    found: dict[int, np.ndarray] = {}
    for size in sorted(set(map(len, prompts))):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == size]
        found |= zip(rows, continued(rows, size), strict=True)
    return [found[row] for row in range(len(prompts))]


def until_end(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """The tokens before the first end of a document."""
    ends = np.flatnonzero(tokens == eos_id)
    return tokens[: ends[0]] if len(ends) else tokens


def generate_run(
    folder: Path,
    prompts: Sequence[str],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    max_tokens: int,
    stop: Sequence[str],
    json: Path | None,
    text_file: Path | None = None,
) -> list[str]:
    """Continues prompts with a run's last checkpoint; prints the texts and writes them as JSON.

    A text ends before a stop string or the end-of-document token. With `text_file`, each prompt and its continuation
    go there as a line of JSON, a document to train on, and are not printed.

    Raises UserError if the folder is not a run or a value is impossible.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if max_tokens < 1:
        raise UserError(f"max-tokens must be at least 1, not {max_tokens}")
    if "" in stop:
        raise UserError("stop must not be empty")
    saved = load(folder)
    encoded = [encode_prompt(saved.tokenizer, prompt) for prompt in prompts]
    positions = saved.experiment.model.learned_positions
    if positions and max(map(len, encoded)) + max_tokens > positions:
        raise UserError(f"prompt and max-tokens together must not exceed model.learned_positions {positions}")

    def text(row: int, tokens: np.ndarray) -> tuple[str, bool]:
        document = until_end(tokens, saved.tokenizer.eos_id)
        # After its prompt: some tokenizers drop the space in front of a text.
        full = saved.tokenizer.decode([*encoded[row], *document])[len(saved.tokenizer.decode(encoded[row])) :]
        cut = min((full.index(s) for s in stop if s in full), default=len(full))
        return full[:cut], len(document) < len(tokens) or cut < len(full)

    with Reporter() as reporter, reporter.task("generate", max_tokens, "tokens") as task:
        drawn = generate(
            saved.graphdef,
            saved.params,
            encoded,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            finished=lambda row, tokens: text(row, tokens)[1],
            progress=task.update,
        )
    texts = [text(row, tokens)[0] for row, tokens in enumerate(drawn)]
    record: dict[str, Any] = {
        "run": str(folder),
        "step": saved.step,
        "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed},
        "max_tokens": max_tokens,
        "stop": list(stop),
        "texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)],
    }
    run.write_json(json or folder / "generation.json", record)
    console = Console(highlight=False)
    if text_file is not None:
        text_file.write_text("".join(dumps({"text": p + t}) + "\n" for p, t in zip(prompts, texts, strict=True)))
        console.print(f"{len(texts):,} documents → {text_file}", markup=False, soft_wrap=True)
        return texts
    for i, (prompt, text_) in enumerate(zip(prompts, texts, strict=True)):
        if i:
            console.print(Rule())
        console.print(prompt, style="bold", end="", markup=False, soft_wrap=True)
        console.print(text_, markup=False, soft_wrap=True)
    return texts
