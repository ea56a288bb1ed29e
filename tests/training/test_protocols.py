"""Protocols: what is asked, what is read out of the answers, and how sure the figure is."""

import dataclasses
import json
from decimal import Decimal

import numpy as np
import pytest

from phyla.models.errors import UserError
from phyla.training import protocols
from phyla.training.data.arithmetic import INSTRUCTIONS, Protocol, problems
from phyla.training.data.chat import chat_format
from phyla.training.data.tokenizers import ByteTokenizer, encode_prompt
from phyla.training.generate import generate
from phyla.training.protocols import (
    STOP,
    evaluate_protocol,
    extract_number,
    extract_program,
    interval,
    make_prompt,
    plain_prompt,
)
from phyla.training.respond import GREEDY, respond, until
from phyla.training.saved import load

BYTES = ByteTokenizer()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("37 + 58 = 95. The answer is 95.", 95),
        ("The answer is 7. No: the answer is 8. That is 3 more than 5.", 8),
        ("So she pays $1,234.50 in all.", Decimal("1234.5")),
        ("5 - 8 = -3", -3),
        ("it is −3", -3),
        ("Half of it is 75.00", 75),
        ("#### 72\n", 72),
        ("Answer: about 12", 12),
        ("The answer is unclear, perhaps 6", 6),
        ("The answer is nothing", None),
        ("", None),
        ("1,2,3", 3),
        ("2024-11", -11),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert extract_number(text) == number


def test_the_program_of_an_answer():
    assert extract_program("n = 1\nprint(n)") == "n = 1\nprint(n)"
    assert extract_program("Sure:\n```python\nprint(1)\n```\nAnd\n```\nprint(2)\n```") == "print(1)\n"
    assert extract_program("```\nprint(3)") == "print(3)"


@pytest.mark.parametrize(("right", "asked"), [(0, 10), (5, 10), (10, 10), (263, 300)])
def test_the_interval_holds_the_shares_that_the_score_test_accepts(right, asked):
    # |share - p| = z √(p (1 - p) / n), the roots of a quadratic in p
    share, z2 = right / asked, 3.8414588
    ends = np.sort(np.roots([1 + z2 / asked, -2 * share - z2 / asked, share**2]).real)
    np.testing.assert_allclose(interval(right, asked), ends, atol=1e-6)


def test_examples_come_before_the_problem():
    first, second, problem = problems(3, "train")
    text = plain_prompt(problem, [first, second], "cot")
    assert text.count("Question: ") == 3
    assert text.index(first.thought) < text.index(second.thought) < text.index(problem.question)
    assert text.endswith("Think step by step.\nAnswer:\n")
    assert problem.thought not in text
    tokens = make_prompt(problem, [first], "pal", BYTES, chat_format("plain", BYTES))
    ask = "User:\n{}\nWrite a Python program.\n\nAssistant:\n"
    shown = (ask.format(first.question) + first.program).encode()
    expected = [256, *shown, 256, *ask.format(problem.question).encode()]
    assert tokens.tolist() == expected


def test_a_response_ends_at_the_first_end():
    ids = np.asarray([*b"one\nQuestion: two", 256, *b"x"])
    assert until(BYTES, ids, 256, ()) == ("one\nQuestion: two", True)
    assert until(BYTES, ids, 256, ("\nQuestion:",)) == ("one", True)
    assert until(BYTES, ids[:3], 256, ("\nQuestion:",)) == ("one", False)


def test_perfect_and_wrong_answers_are_told_apart(trained, tmp_path, monkeypatch, capsys):
    """The model is replaced by one that answers what it should, except one; everything else is real."""
    asked = list(problems(9, "validation", seed=1))

    for protocol in INSTRUCTIONS:
        wrong = {"direct": "12345", "cot": "The answer is 12345.", "pal": "while True print"}[protocol]

        def respond(saved, prompts, protocol: Protocol = protocol, wrong=wrong, **options):
            return [(wrong if i == 2 else each.response(protocol), True) for i, each in enumerate(asked)]

        monkeypatch.setattr(protocols, "respond", respond)
        out = tmp_path / f"{protocol}.json"
        evaluate_protocol(trained, protocol, shots=None, count=9, max_tokens=4, json=out)
        record = json.loads(out.read_text())
        assert record["shots"] == 4
        assert record["accuracy"]["all"] == {
            "asked": 9,
            "right": 8,
            "accuracy": 8 / 9,
            "interval": pytest.approx(interval(8, 9)),
        }
        assert record["accuracy"]["level 3"]["right"] == 2
        assert [each["right"] for each in record["transcripts"]] == [i != 2 for i in range(9)]
        first = record["transcripts"][0]
        assert first["prompt"].count("Question: ") == 5
        assert first["found"] == str(asked[0].answer)
        if protocol == "pal":
            assert first["program"]["output"] == f"{asked[0].answer}\n"
            assert record["transcripts"][2]["program"]["status"] == "failed"
        assert "88.9%" in capsys.readouterr().out


def test_a_model_is_asked_for_real(trained, tmp_path):
    record = evaluate_protocol(trained, "pal", shots=0, count=3, max_tokens=3, json=tmp_path / "a.json")
    saved = load(trained)
    shortest = min(record["transcripts"], key=lambda each: len(each["prompt"]))
    prompt = encode_prompt(BYTES, shortest["prompt"])
    (alone,) = generate(saved.graphdef, saved.params, [prompt], max_tokens=3, sampling=GREEDY)
    assert (shortest["response"], shortest["ended"]) == until(BYTES, alone, 256, (STOP,))  # padding changes nothing
    short = dataclasses.replace(saved.experiment.model, learned_positions=64)
    saved = dataclasses.replace(saved, experiment=dataclasses.replace(saved.experiment, model=short))
    with pytest.raises(UserError, match=r"together must not exceed model\.learned_positions 64"):
        respond(saved, [prompt], end_id=256, max_tokens=3)
