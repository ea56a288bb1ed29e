"""Arithmetic word problems, made here: each with its question, a chain of thought, a program and the answer.

A problem is a start and 1 to 3 steps (its level), told as a story of someone who has things. Whether it is for training
or held out follows from its numbers and operations alone, so that no wording of a held-out sum is ever trained on.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from phyla.training.data.conversations import Conversation, Turn

Split = Literal["train", "validation"]
Protocol = Literal["direct", "cot", "pal"]
"""How a problem is to be answered: at once, by a chain of thought, or by a program."""

LEVELS = (1, 2, 3)

INSTRUCTIONS: dict[Protocol, str] = {
    "direct": "Answer with a number.",
    "cot": "Think step by step.",
    "pal": "Write a Python program.",
}

_NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
_THINGS = ("apples", "books", "coins", "eggs", "nuts", "pens", "shells", "stamps")
_TOLD = {
    "+": ("{name} gets {n} more.", "{name} finds {n} more.", "{name} buys {n} more."),
    "-": ("{name} loses {n}.", "{name} sells {n}.", "{name} gives away {n}."),
    "*": ("Then {name} has {n} times as many.",),
}
_HELD_OUT = 8
"""One sum in so many is held out."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem and what a perfect answer to it is under each protocol."""

    level: int
    question: str
    start: int
    steps: tuple[tuple[str, int], ...]
    """Operation ("+", "-" or "*") and number, in their order, each of the result before."""

    @property
    def answer(self) -> int:
        """The number asked for."""
        return self._results()[-1]

    @property
    def thought(self) -> str:
        """The chain of thought: "So 37 + 58 = 95. The answer is 95."."""
        results = [self.start, *self._results()]
        sums = [f"{results[i]} {op} {n} = {results[i + 1]}." for i, (op, n) in enumerate(self.steps)]
        return " ".join(["So", *sums, f"The answer is {self.answer}."])

    @property
    def program(self) -> str:
        """Python that prints the answer."""
        return "\n".join([f"n = {self.start}", *(f"n = n {op} {n}" for op, n in self.steps), "print(n)"])

    def response(self, protocol: Protocol) -> str:
        """What to say under a protocol."""
        return {"direct": str(self.answer), "cot": self.thought, "pal": self.program}[protocol]

    def asked(self, protocol: Protocol) -> str:
        """The question and how to answer it."""
        return f"{self.question}\n{INSTRUCTIONS[protocol]}"

    def conversation(self, protocol: Protocol) -> Conversation:
        """The question under a protocol, answered."""
        return Turn("user", self.asked(protocol)), Turn("assistant", self.response(protocol))

    def _results(self) -> list[int]:
        results, value = [], self.start
        for op, n in self.steps:
            value = {"+": value + n, "-": value - n, "*": value * n}[op]
            results.append(value)
        return results


def problems(count: int, split: Split, seed: int = 0) -> Iterator[Problem]:
    """Yield `count` problems, the levels in turn, drawn independently of each other: a large count repeats some."""
    rng = random.Random(f"{split} {seed}")
    for i in range(count):
        while split_of(problem := _draw(rng, LEVELS[i % len(LEVELS)])) != split:
            pass
        yield problem


def split_of(problem: Problem) -> Split:
    """Return whether a problem is for training or held out: a function of its numbers and operations."""
    key = f"{problem.start}{''.join(f'{op}{n}' for op, n in problem.steps)}"
    return "validation" if zlib.crc32(key.encode()) % _HELD_OUT == 0 else "train"


def conversations(count: int, split: Split) -> list[Conversation]:
    """Return `count` problems under each of the protocols."""
    return [each.conversation(protocol) for each in problems(count, split) for protocol in INSTRUCTIONS]


def _draw(rng: random.Random, level: int) -> Problem:
    """Numbers below 100, results from 0 to 999; only the last step of the highest level multiplies."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    value = start = rng.randint(2, 99)
    steps, told = [], [f"{name} has {start} {thing}."]
    for step in range(level):
        if step == LEVELS[-1] - 1:
            op, n = "*", rng.randint(2, 3)
            value *= n
        elif value > 2 and rng.random() < 0.5:
            op, n = "-", rng.randint(2, min(value, 99))
            value -= n
        else:
            op, n = "+", rng.randint(2, 99)
            value += n
        steps.append((op, n))
        told.append(rng.choice(_TOLD[op]).format(name=name, n=n))
    question = " ".join([*told, f"How many {thing} now?"])
    return Problem(level=level, question=question, start=start, steps=tuple(steps))
