"""Conversations: every layout, the tokens that count one by one, whole examples in rows, and training on them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.training.config import Experiment
from phyla.training.data.chat import Encoded, chat_format, fit
from phyla.training.data.config import DataConfig
from phyla.training.data.conversations import Turn, read_record
from phyla.training.data.pipeline import RowPacker, prepare, train_iterator
from phyla.training.data.sources import conversations, documents
from phyla.training.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, make_tokenizer
from phyla.training.evaluate import evaluate_run
from phyla.training.generate import generate
from phyla.training.log import read
from phyla.training.loop import train
from phyla.training.objectives import next_token
from phyla.training.respond import GREEDY
from phyla.training.saved import load

BYTES = ByteTokenizer()
ASKED = (Turn("user", "Hi"), Turn("assistant", "Yo!"))


@functools.cache
def words(*special: str) -> HuggingFaceTokenizer:
    """One token for each character or special token; <s> begins and </s> ends a document."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", *special], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([], trainer)
    return HuggingFaceTokenizer(core, 0, 1)


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def spelled(tokenizer, encoded: Encoded) -> list[tuple[str, int]]:
    """Each token by its name or text, and whether it counts."""
    names = {tokenizer.bos_id: "<s>"} | {
        i: name for name in ("</s>", *CHATML, *LLAMA3) if (i := tokenizer.special_id(name)) is not None
    }
    texts = [names.get(int(i)) or tokenizer.decode([int(i)]) for i in encoded.tokens]
    return list(zip(texts, map(int, encoded.weights), strict=True))


def marked(text: str) -> list[tuple[str, int]]:
    """Read "ab[cd]": the characters a and b, which do not count, and c and d, which do; {x} is a token x."""
    found, counts, token = [], 0, None
    for character in text:
        if character in "[]":
            counts = int(character == "[")
        elif character == "{":
            token = ""
        elif character == "}":
            found, token = [*found, (token, counts)], None
        elif token is not None:
            token += character
        else:
            found.append((character, counts))
    return found


SYSTEM = (Turn("system", "Be"), *ASKED, Turn("user", "No"), Turn("assistant", ""))


@pytest.mark.parametrize(
    ("template", "special", "conversation", "expected"),
    [
        ("plain", (), ASKED, "{<s>}User:\nHi\n\nAssistant:\n[Yo!{</s>}]"),
        (
            "plain",
            (),
            SYSTEM,
            "{<s>}System:\nBe\n\nUser:\nHi\n\nAssistant:\n[Yo!{</s>}]User:\nNo\n\nAssistant:\n[{</s>}]",
        ),
        (
            "chatml",
            CHATML,
            ASKED,
            "{<|im_start|>}user\nHi{<|im_end|>}\n{<|im_start|>}assistant\n[Yo!{<|im_end|>}]\n",
        ),
        (
            "llama3",
            LLAMA3,
            ASKED,
            "{<s>}{<|start_header_id|>}user{<|end_header_id|>}\n\nHi{<|eot_id|>}"
            "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n[Yo!{<|eot_id|>}]",
        ),
    ],
)
def test_the_tokens_that_count_one_by_one(template, special, conversation, expected):
    tokenizer = words(*special)
    for name in (template, "auto"):  # the tokenizer's markers say which
        chat = chat_format(name, tokenizer)
        assert chat.name == template
        assert spelled(tokenizer, chat.encode(conversation)) == marked(expected)
    # a prompt is what is in front of the response
    tokens, weights = chat.encode(conversation)
    before = [turn for turn in conversation if turn is not conversation[-1]]
    last = len(tokens) - 1 - np.argmax(weights[::-1])  # of the tokens that count
    response = len(tokenizer.encode(conversation[-1].content))
    assert chat.prompt(tuple(before)).tolist() == tokens[: last - response].tolist()
    assert tokens[last] == chat.end_id


def test_a_marker_in_what_is_said_is_plain_text():
    tokenizer = words(*CHATML)
    encoded = chat_format("chatml", tokenizer).encode((Turn("user", "<|im_end|>"), Turn("assistant", "<|im_end|>")))
    assert np.count_nonzero(encoded.tokens == tokenizer.special_id("<|im_end|>")) == 2
    assert encoded.weights.sum() == len("<|im_end|>") + 1


def test_a_template_whose_markers_are_missing_is_refused():
    with pytest.raises(
        UserError, match=r"'chatml' needs the special tokens <\|im_start\|>, <\|im_end\|>.*nearest: plain"
    ):
        chat_format("chatml", BYTES)
    assert chat_format("auto", BYTES).name == "plain"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}], "prompt": "Hi"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo!"}]},
        {"instruction": "Hi", "input": "", "output": "Yo!"},
        {"instruction": "Hi", "output": "Yo!"},
        {"prompt": "Hi", "response": "Yo!"},
        {"prompt": "Hi", "completion": "Yo!"},
        {"question": "Hi", "answer": "Yo!"},
    ],
)
def test_layouts(record):
    assert read_record(record, "here") == ASKED
    with_input = read_record({"instruction": "Add", "input": "1 2", "output": "3"}, "here")
    assert with_input[0].content == "Add\n\n1 2"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "Hi", "label": 1},
            r"here: a record with the keys 'text', 'label' is no conversation; layouts: messages; conversations; "
            r"instruction, output; prompt, response; prompt, completion; question, answer",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "here: no role 'tool' .all: system, user,"),
        ({"messages": [{"role": "user"}]}, "here: 'messages' is not a list of turns with their role and content"),
        ({"messages": "Hi"}, "here: 'messages' is not a list of turns"),
        ({"prompt": "Hi", "response": None}, "here: what the assistant says must be a string, not NoneType"),
        ({"prompt": "\ud800", "response": "x"}, "here: what the user says is not valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_refused(record, message):
    with pytest.raises(UserError, match=message):
        read_record(record, "here")


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


PAIRS = [{"prompt": f"Say {'ab' * (i % 4)}{i}.", "response": f"{i}{'é' * (i % 3)}"} for i in range(40)]


@pytest.mark.parametrize("source", ["file", "datasets"])
@pytest.mark.parametrize("streaming", [False, True])
def test_sources(tmp_path, monkeypatch, source, streaming):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set" / "a.jsonl", PAIRS)
    data = DataConfig(
        source=path if source == "file" else f"hf:{tmp_path}/set",
        validation=write(tmp_path / "v.jsonl", PAIRS[:2]),
        template="plain",
        streaming=streaming,
    )
    expected = [(Turn("user", each["prompt"]), Turn("assistant", each["response"])) for each in PAIRS]
    assert list(conversations(data, "train")) == expected
    assert list(documents(data, "train"))[:2] == ["Say 0.\n0", "Say ab1.\n1é"]  # a vocabulary learns from these


def test_held_out_conversations_and_refusals(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    data = DataConfig(source=path, template="plain", validation_fraction=0.1, tokenizer="bpe:300")
    assert len(list(conversations(data, "train"))) == 36
    assert list(conversations(data, "validation"))[-1][1].content == PAIRS[-1]["response"]
    assert make_tokenizer(data).vocab_size <= 300
    (tmp_path / "b.txt").write_text("Hi")
    with pytest.raises(UserError, match=r"b.txt: conversations .data.template. are read from PATH.jsonl or hf:"):
        list(conversations(dataclasses.replace(data, source=f"{tmp_path}/b.txt"), "train"))
    write(tmp_path / "c.jsonl", [*PAIRS[:2], {"a": 1}])
    with pytest.raises(UserError, match=r"c.jsonl:3: a record with the keys 'a' is no conversation"):
        list(conversations(dataclasses.replace(data, source=f"{tmp_path}/c.jsonl"), "train"))


@given(
    examples=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=12),
    row_length=st.integers(3, 14),
)
def test_every_response_token_that_fits_counts_exactly_once(examples, row_length):
    encoded, begin = [], 1
    for prompt, response in examples:
        ids = np.arange(begin, begin + prompt + response, dtype=np.int32)
        encoded.append(Encoded(ids, np.asarray([0.0] * prompt + [1.0] * response, np.float32)))
        begin += prompt + response
    fitting = [each for each in (fit(each, row_length) for each in encoded) if each is not None]
    # left out: no response, or one that has no room with one token before it
    assert len(fitting) == sum(0 < response < row_length for _, response in examples)
    rows = list(RowPacker((each._asdict() for each in fitting), row_length, whole=True))
    assert all(row[name].shape == (row_length,) for row in rows for name in ("tokens", "segment_ids", "weights"))
    counted = [t for row in rows for t, w in zip(row["tokens"], row["weights"], strict=True) if w]
    expected = [
        t
        for each, (_, response) in zip(encoded, examples, strict=True)
        if 0 < response < row_length
        for t in each.tokens[-response:]
    ]
    assert counted == expected
    # each example is whole, alone in its segment, and its first token is no target
    segments = [row["tokens"][row["segment_ids"] == s] for row in rows for s in range(1, row["segment_ids"].max() + 1)]
    assert [each.tolist() for each in segments] == [each.tokens.tolist() for each in fitting]
    assert all(each.weights[0] == 0 for each in fitting)


def test_what_does_not_fit_is_told(tmp_path):
    records = [
        {"prompt": "short", "response": "ok"},
        {"prompt": "long " * 20, "response": "kept"},
        {"prompt": "q", "response": "far too long " * 10},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ]
    data = DataConfig(
        source="arithmetic:2",
        validation=write(tmp_path / "v.jsonl", records),
        template="plain",
        sequence_length=40,
    )
    packed = prepare(data, BYTES, "validation")
    assert packed.weights is not None
    assert (packed.num_tokens, packed.num_bytes) == (len("ok") + 1 + len("kept") + 1, len("okkept"))
    assert packed.weights.sum() == packed.num_tokens
    assert packed.note == (
        "of 4 validation conversations 1 lost their beginning and 2 were left out: too long for a row of "
        "data.sequence_length + 1 = 41 tokens, or without a response"
    )
    ends = bytes(packed.tokens[1][:40].tolist())
    assert ends.endswith(b"long \n\nAssistant:\nkept")
    told = []
    train_data = dataclasses.replace(data, source=data.validation, validation="arithmetic:1")
    train_iterator(train_data, BYTES, batch_size=1, seed=0, note=told.append)
    assert len(told) == 1
    with pytest.raises(UserError, match="none of the 4 validation conversations has a response that fits"):
        prepare(dataclasses.replace(data, sequence_length=2), BYTES, "validation")
    assert prepare(data, BYTES, "validation", max_tokens=1).num_tokens == 3  # the first example, whole


@pytest.fixture
def chat_experiment(experiment, tmp_path) -> Experiment:
    data = DataConfig(
        source=write(tmp_path / "train.jsonl", PAIRS),
        validation=write(tmp_path / "held.jsonl", PAIRS[:7]),
        template="plain",
        sequence_length=63,
    )
    return dataclasses.replace(experiment, data=data)


def test_packed_examples_equal_separate_ones(chat_experiment):
    model = dataclasses.replace(chat_experiment.model, vocab_size=257)
    graphdef, params = nnx.split(LanguageModel(model, nnx.Rngs(0)))
    packed = prepare(chat_experiment.data, BYTES, "validation")
    chat = chat_format("plain", BYTES)
    alone = [
        next(RowPacker(iter([chat.encode(each)._asdict()]), 64, whole=True))
        for each in conversations(chat_experiment.data, "validation")
    ]
    separate = {name: np.stack([row[name] for row in alone]) for name in alone[0]}
    assert len(packed.tokens) < len(separate["tokens"])

    @jax.jit
    def sums(params, batch):
        def total(params):
            loss = next_token(nnx.merge(graphdef, params), batch, jax.random.key(0), chunk=10_000)
            return loss.total, loss.weight

        return jax.value_and_grad(total, has_aux=True)(params)

    (loss, weight), gradient = sums(params, packed.rows)
    (expected, same_weight), expected_gradient = sums(params, separate)
    assert weight == same_weight == packed.num_tokens
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, expected_gradient)
    # and of the prompts nothing counts
    unmasked = {name: value for name, value in separate.items() if name != "weights"}
    assert sums(params, unmasked)[0][1] > 3 * weight


@pytest.mark.parametrize("streaming", [False, True])
def test_a_restored_iterator_goes_on_exactly(chat_experiment, streaming):
    data = dataclasses.replace(chat_experiment.data, streaming=streaming, shuffle_buffer=4)
    iterator = train_iterator(data, BYTES, batch_size=3, seed=7)
    states, batches = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    assert batches[0]["weights"].shape == (3, 64)
    assert batches[0]["weights"].dtype == np.float32
    other = train_iterator(data, BYTES, batch_size=3, seed=7)
    for step in (0, 19, 3, 8):
        other.set_state(states[step])
        for expected in batches[step:]:
            jax.tree.map(np.testing.assert_array_equal, next(other), expected)


def test_training_resumes_exactly_and_evaluation_is_of_responses(chat_experiment, tmp_path, capsys):
    experiment = dataclasses.replace(
        chat_experiment, loop=dataclasses.replace(chat_experiment.loop, microbatches=2, steps=20)
    )
    train(experiment, tmp_path / "parts", max_steps=10)
    train(experiment, tmp_path / "parts")
    train(experiment, tmp_path / "whole")
    a, b = load(tmp_path / "parts"), load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    losses = [[line["loss"] for line in read(tmp_path / name) if "loss" in line] for name in ("parts", "whole")]
    assert losses[0] == losses[1]

    capsys.readouterr()
    score = evaluate_run(tmp_path / "whole", exact_tokens=4)
    record = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    held = list(conversations(experiment.data, "validation"))
    assert score.tokens == sum(len(each[1].content.encode()) + 1 for each in held)
    # of each response by itself, without packing
    chat, model, total = chat_format("plain", BYTES), b.model(), 0.0
    tokens, weights = np.zeros((len(held), 64), np.int32), np.zeros((len(held), 64), np.float32)
    for row, each in enumerate(held):
        encoded = chat.encode(each)
        tokens[row, : len(encoded.tokens)], weights[row, : len(encoded.tokens)] = encoded
    log_p = jax.nn.log_softmax(model.logits(model(jnp.asarray(tokens[:, :-1]))[0]))
    total = -float((np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], -1)[..., 0] * weights[:, 1:]).sum())
    np.testing.assert_allclose(score.nats_per_token, total / score.tokens, rtol=1e-4)

    short = [each for each in held if len(each[1].content.encode()) < 4]
    assert 0 < len(short) < len(held)
    right = 0
    drawn = generate(b.graphdef, b.params, [chat.prompt(each[:1]) for each in short], max_tokens=4, sampling=GREEDY)
    for each, tokens_ in zip(short, drawn, strict=True):
        right += [*each[1].content.encode(), 256] == tokens_[: len(each[1].content.encode()) + 1].tolist()
    assert record["exact_match"] == {"right": right, "asked": len(short), "max_tokens": 4}
    assert "exact (≤ 4" in capsys.readouterr().out


def test_masked_tokens_and_conversations_do_not_go_together(chat_experiment):
    with pytest.raises(UserError, match="are learned with the objective next-token"):
        dataclasses.replace(chat_experiment, objective="masked-token")
