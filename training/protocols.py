"""Protocols of asking: a number at once, a chain of thought, or a program that is run (PAL).

Few-shot chains of thought are Wei et al. 2022 (arXiv:2201.11903), programs are Gao et al. 2022 (arXiv:2211.10435). The
problems are phyla's own (`data.arithmetic`), held out from all training on "arithmetic:N"; examples are drawn from
those for training. A run that learned conversations is asked in its template, with the examples as earlier turns; any
other is asked in plain text, "Question: … Answer: …".
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from phyla.models.errors import UserError
from phyla.training import run
from phyla.training.data.arithmetic import LEVELS, Problem, Protocol, problems
from phyla.training.data.chat import ChatFormat, chat_format
from phyla.training.data.conversations import Turn
from phyla.training.data.tokenizers import Tokenizer, encode_prompt
from phyla.training.progress import Reporter
from phyla.training.respond import respond
from phyla.training.sandbox import Outcome, run_python
from phyla.training.saved import load

SHOTS_IN_TEXT = 4
"""Examples for a run that has not learned conversations."""
STOP = "\nQuestion:"
"""Where a plain text goes on to another question."""

_NUMBER = re.compile(r"[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_number(text: str) -> Decimal | None:
    """The number after the last "answer is", "answer:" or "####", else the last number of all; None if there is none.

    Understands 1,234 and $5 and 7.50.
    """
    parts = re.split(r"answer is|answer:|####", text, flags=re.IGNORECASE)
    found = _NUMBER.search(parts[-1]) if len(parts) > 1 else None
    if found is None:
        *_, found = [None, *_NUMBER.finditer(text)]
    return None if found is None else Decimal(found[0].replace(",", "").replace("$", "").replace("−", "-"))


def extract_program(text: str) -> str:
    """The first fenced block of a response, else all of it."""
    found = _FENCED.search(text)
    return found[1] if found else text


def plain_prompt(problem: Problem, examples: Sequence[Problem], protocol: Protocol) -> str:
    """Examples and a problem as text, up to where the answer begins."""
    shown = [f"Question: {each.asked(protocol)}\nAnswer:\n{each.response(protocol)}\n\n" for each in examples]
    return "".join([*shown, f"Question: {problem.asked(protocol)}\nAnswer:\n"])


def make_prompt(
    problem: Problem, examples: Sequence[Problem], protocol: Protocol, tokenizer: Tokenizer, chat: ChatFormat | None
) -> np.ndarray:
    """The tokens that ask a problem after its examples; in plain text without a chat format."""
    if chat is None:
        return encode_prompt(tokenizer, plain_prompt(problem, examples, protocol))
    turns = [turn for each in examples for turn in each.conversation(protocol)]
    return chat.prompt((*turns, Turn("user", problem.asked(protocol))))


def interval(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, share = 1.959964, right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, (middle - half) / (1 + z * z / asked)), min(1.0, (middle + half) / (1 + z * z / asked))


def evaluate_protocol(
    folder: Path, protocol: Protocol, *, shots: int | None, count: int, max_tokens: int, json: Path | None
) -> dict[str, Any]:
    """Asks a run's model held-out problems; prints its accuracy and writes it with every transcript as JSON.

    Args:
        folder: the run.
        protocol: how to ask.
        shots: examples before each problem; None: none for a run that learned conversations, else `SHOTS_IN_TEXT`.
        count: problems, the levels in turn.
        max_tokens: of a response.
        json: where the table goes; None: evaluation-PROTOCOL.json in the folder.

    Raises UserError if the folder is not a run or has no tokenizer, or the model's positions do not suffice.
    """
    saved = load(folder)
    data, tokenizer = saved.experiment.data, saved.tokenizer
    if saved.experiment.model.bidirectional:
        raise UserError(f"{folder} is an encoder, which continues nothing")
    chat = None if data.template is None else chat_format(data.template, tokenizer)
    shots = shots if shots is not None else 0 if chat else SHOTS_IN_TEXT
    asked = list(problems(count, "validation", seed=1))
    drawn = list(problems(count * shots, "train", seed=1))
    examples = [drawn[i * shots : (i + 1) * shots] for i in range(count)]
    prompts = [make_prompt(*each, protocol, tokenizer, chat) for each in zip(asked, examples, strict=True)]
    with Reporter() as reporter, reporter.task(protocol, count, "problems") as task:
        responses = respond(
            saved,
            prompts,
            end_id=chat.end_id if chat else tokenizer.eos_id,
            stop=() if chat else (STOP,),
            max_tokens=max_tokens,
            progress=task.update,
        )
    transcripts = [
        _transcript(problem, tokenizer.decode(prompt), response, ended, protocol)
        for problem, prompt, (response, ended) in zip(asked, prompts, responses, strict=True)
    ]
    rows = {"all": transcripts} | {
        f"level {level}": [each for each in transcripts if each["level"] == level] for level in LEVELS
    }
    record = {
        "run": str(folder),
        "step": saved.step,
        "protocol": protocol,
        "shots": shots,
        "max_tokens": max_tokens,
        "accuracy": {name: _accuracy(some) for name, some in rows.items() if some},
        "transcripts": transcripts,
    }
    run.write_json(json or folder / f"evaluation-{protocol}.json", record)
    table = Table(title=f"{folder} at step {saved.step:,}: {protocol}, {shots} examples")
    for column in ("problems", "asked", "right", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "problems" else "right")
    for name, row in record["accuracy"].items():
        low, high = row["interval"]
        figures = f"{row['asked']:,}", f"{row['right']:,}", f"{row['accuracy']:.1%}", f"{low:.1%} – {high:.1%}"
        table.add_row(name, *figures)
    Console().print(table)
    return record


def _transcript(problem: Problem, prompt: str, response: str, ended: bool, protocol: Protocol) -> dict[str, Any]:
    outcome = run_python(extract_program(response)) if protocol == "pal" else None
    found = extract_number(response) if outcome is None else _printed(outcome)
    return {
        "level": problem.level,
        "prompt": prompt,
        "response": response,
        "ended": ended,
        **({} if outcome is None else {"program": vars(outcome)}),
        "found": None if found is None else str(found),
        "answer": problem.answer,
        "right": found == problem.answer,
    }


def _printed(outcome: Outcome) -> Decimal | None:
    """The last number that a program printed, if it came to its end."""
    return extract_number(outcome.output) if outcome.status == "done" else None


def _accuracy(transcripts: list[dict[str, Any]]) -> dict[str, Any]:
    right, asked = sum(each["right"] for each in transcripts), len(transcripts)
    return {"asked": asked, "right": right, "accuracy": right / asked, "interval": interval(right, asked)}
