"""Arithmetic problems: answers that Python agrees with, and a held-out side that training never sees."""

import contextlib
import io
import itertools
import re

import pytest

from phyla.models.errors import UserError
from phyla.training.data.arithmetic import INSTRUCTIONS, LEVELS, conversations, problems, split_of
from phyla.training.data.config import DataConfig
from phyla.training.data.sources import conversations as read


def sums(split, seed=0, count=900):
    return {(each.start, each.steps) for each in problems(count, split, seed)}


def printed(program: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue()


def test_program_thought_question_and_answer_agree():
    for problem in problems(300, "train", seed=3):
        assert printed(problem.program) == f"{problem.answer}\n"
        *steps, last = problem.thought.removeprefix("So ").removesuffix(".").split(". ")
        assert last == f"The answer is {problem.answer}"
        assert len(steps) == len(problem.steps) == problem.level
        value = problem.start
        for step in steps:
            left, right = step.split(" = ")
            assert int(left.split()[0]) == value  # goes on from the step before
            value = int(right)
            assert eval(left) == value
        assert value == problem.answer
        # the story tells the numbers in their order
        assert [int(n) for n in re.findall(r"\d+", problem.question)] == [problem.start, *(n for _, n in problem.steps)]
        assert 0 <= problem.answer <= 999


def test_held_out_sums_are_never_trained_on():
    trained, held = sums("train") | sums("train", seed=1), sums("validation") | sums("validation", seed=1)
    assert not trained & held
    assert len(trained) > 1000
    assert len(held) > 300
    for split in ("train", "validation"):
        assert {split_of(problem) for problem in problems(60, split)} == {split}


def test_problems_are_a_function_of_count_split_and_seed():
    assert list(problems(20, "train", 5)) == list(problems(20, "train", 5)) != list(problems(20, "train", 6))
    assert list(problems(9, "train")) == list(itertools.islice(problems(20, "train"), 9))
    assert [each.level for each in problems(6, "train")] == [*LEVELS, *LEVELS]


def test_the_source_is_each_problem_under_each_protocol():
    config = DataConfig(source="arithmetic:40", template="plain", validation_fraction=0.1)
    train, held = list(read(config, "train")), list(read(config, "validation"))
    assert train == conversations(40, "train")
    assert held == conversations(4, "validation")
    named = DataConfig(source="arithmetic:40", validation="arithmetic:4", template="plain")
    assert list(read(named, "validation")) == held
    problem = next(problems(1, "train"))
    assert [each[1].content for each in train[:3]] == [str(problem.answer), problem.thought, problem.program]
    assert [each[0].content for each in train[:3]] == [f"{problem.question}\n{each}" for each in INSTRUCTIONS.values()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "arithmetic:0", "template": "plain"}, "with N at least 1, as in arithmetic:10000, not"),
        ({"source": "arithmetic:many", "template": "plain"}, "data.source must be arithmetic:N"),
        ({"source": "arithmetic:9"}, "data.source 'arithmetic:9' is conversations: name a template"),
        ({"template": "plain"}, "data.source 'austen' has no conversations"),
    ],
)
def test_a_source_that_contradicts_the_template_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**values)
