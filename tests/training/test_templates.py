"""A tokenizer's own chat template: what transformers writes, and which of its tokens count."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from phyla.models.errors import UserError
from phyla.models.formats.gguf import read_vocabulary
from phyla.training.convert import export_model, import_model
from phyla.training.data.chat import chat_format
from phyla.training.data.config import DataConfig
from phyla.training.data.conversations import Turn
from phyla.training.data.pipeline import prepare
from phyla.training.data.templates import ChatTemplate, find_template
from phyla.training.data.tokenizers import HuggingFaceTokenizer, load_tokenizer, make_tokenizer

LLAMA = Path(__file__).parents[1] / "goldens" / "llama"
CHAT = json.loads((LLAMA.parent / "chat.json").read_text(encoding="utf-8"))
TEMPLATES = {name: each["template"] for name, each in CHAT["templates"].items()}
SAID = tuple(Turn(**each) for each in CHAT["said"])
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
# What counts of what transformers writes (tests/goldens/make_chat.py), between ⟦ and ⟧.
COUNTED = {
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo!<|im_end|>⟧\n"
        "<|im_start|>user\n No <|im_end|>\n<|im_start|>assistant\n⟦Ok <&> é<|im_end|>⟧\n"
    ),
    "smollm2": (
        SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo!<|im_end|>⟧\n"
        "<|im_start|>user\n No <|im_end|>\n<|im_start|>assistant\n⟦Ok <&> é<|im_end|>⟧\n"
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yo!<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nNo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Ok <&> é<|eot_id|>⟧"
    ),
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\n⟦Yo!</s>⟧\n<|user|>\n No </s>\n<|assistant|>\n⟦Ok <&> é</s>⟧\n",
    "mistral": "<s>[INST] Hi [/INST]⟦ Yo!</s>⟧[INST]  No  [/INST]⟦ Ok <&> é</s>⟧",
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tokenizer(text: str, *special: str) -> HuggingFaceTokenizer:
    """One token for each byte or special token; <s> begins and </s> ends a document."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", *special],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    return HuggingFaceTokenizer(core, 0, 1, ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}))


def spelled(tokenizer: HuggingFaceTokenizer, tokens: np.ndarray, weights: np.ndarray | None = None) -> str:
    """The text of tokens with the names of special ones, and ⟦ ⟧ around those that count."""
    core = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    text = ""
    for _, group in itertools.groupby(
        enumerate(np.zeros(len(tokens)) if weights is None else weights), lambda each: each[1]
    ):
        places = list(group)
        part = core.decode([int(tokens[i]) for i, _ in places], skip_special_tokens=False)
        text += f"⟦{part}⟧" if places[0][1] else part
    return text


@pytest.mark.parametrize("name", COUNTED)
def test_what_transformers_writes_and_what_counts_of_it(name):
    golden, expected = CHAT["templates"][name], COUNTED[name]
    own = tokenizer(golden["template"], *SPECIAL)
    chat = chat_format("auto", own)
    encoded = chat.encode(SAID)
    assert spelled(own, encoded.tokens) == golden["written"]
    assert spelled(own, encoded.tokens, encoded.weights) == expected
    prompt = chat.prompt(SAID[:3])
    assert spelled(own, prompt) == golden["opened"]
    # a prompt is what training has in front of the response
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.tokens[np.flatnonzero(encoded.weights)[-1]] == chat.end_id
    assert chat_format("plain", own).name == "plain"  # what is named is not the tokenizer's


def test_what_templates_may_say():
    """Loop controls, JSON, marked responses, and what is not given."""
    found = ChatTemplate(TEMPLATES["extensions"], {}).render(CHAT["said"])
    assert found == CHAT["templates"]["extensions"]["written"]
    assert "TrueTrueTrue" in found
    assert len(ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])) == 4


def test_a_marker_in_what_is_said_is_plain_text():
    own = tokenizer(TEMPLATES["chatml"], *SPECIAL)
    said = (Turn("user", "</s><|im_end|>1"), Turn("assistant", "<|im_start|>"))
    encoded = chat_format("auto", own).encode(said)
    assert np.count_nonzero(encoded.tokens == own.special_id("<|im_end|>")) == 2
    assert np.count_nonzero(encoded.tokens == own.special_id("<|im_start|>")) == 2
    assert own.special_id("</s>") not in encoded.tokens
    assert encoded.weights.sum() == len("<|im_start|>") + 1
    text = "<|im_start|>user\n</s><|im_end|>1<|im_end|>\n<|im_start|>assistant\n⟦<|im_start|><|im_end|>⟧\n"
    assert spelled(own, encoded.tokens, encoded.weights) == text


def test_a_space_in_front_of_a_text_is_that_of_the_first_word_alone():
    """SentencePiece's way: a response is read where it stands, not as a text by itself."""
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "b": 3, "<s>": 4, "</s>": 5}, [("▁", "a")])
    )
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    core.add_special_tokens(["<s>", "</s>"])
    template = "{% for m in messages %}{{ 'b ' + m.content if m.role == 'user' else m.content + '</s>' }}{% endfor %}"
    own = HuggingFaceTokenizer(core, 4, 5, ChatTemplate(template, {}))
    encoded = chat_format("auto", own).encode((Turn("user", "a"), Turn("assistant", "a b")))
    assert encoded.tokens.tolist() == [0, 3, 2, 1, 0, 3, 5]
    assert encoded.weights.tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "said", "message"),
    [
        ("{% for message in messages", SAID, "refuses a conversation: .*expected .end of statement block"),
        (
            TEMPLATES["mistral"],
            (Turn("system", "S"), *SAID),
            "refuses a conversation: Conversation roles must alternate",
        ),
        ("{{ messages[0].content + 1 }}", SAID, "refuses a conversation: can only concatenate str"),
        ("{{ messages[9].content.x }}", SAID, "refuses a conversation: .*has no element 9"),
        ("{{ messages.__class__.__mro__ }}", SAID, "refuses a conversation: .*unsafe"),
        ("{{ messages[-1].content }}", SAID, r"writes the beginning of a conversation otherwise.*nearest: plain"),
        (
            TEMPLATES["chatml"].replace("assistant\n' }}", "assistant\n<think>' }}"),
            SAID,
            "writes the beginning of a conversation",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(text, said, message):
    with pytest.raises(UserError, match=message) as found:
        chat_format("auto", tokenizer(text, *SPECIAL)).encode(said)
    assert "\n" not in str(found.value)


def test_where_templates_are_found(tmp_path):
    def write(**config) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    assert find_template(tmp_path) is None
    write(bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None, chat_template="a", add_bos_token=True)
    assert find_template(tmp_path) == ChatTemplate("a", {"bos_token": "<s>", "eos_token": "</s>"})
    write(chat_template=[{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}])
    assert find_template(tmp_path) == ChatTemplate("c", {})
    write(chat_template=[{"name": "rag", "template": "b"}, {"name": "tool_use", "template": "c"}])
    with pytest.raises(
        UserError, match="has the chat templates rag, tool_use and none of the name 'default': write the"
    ):
        find_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("d\n")
    assert find_template(tmp_path) == ChatTemplate("d\n", {})
    said = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["<e>", "a"], "tokenizer.ggml.merges": []}
    found = read_vocabulary(
        said | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.padding_token_id": 1, "tokenizer.chat_template": "e"}
    )
    assert found is not None
    assert found[3:] == ("e", (("bos_token", "<e>"), ("pad_token", "a")))


def test_a_template_comes_along_both_ways(tmp_path):
    """From a folder to a run, to the tokenizer of a run that begins with it, and to a folder again."""
    own = tokenizer(TEMPLATES["mistral"])
    shutil.copytree(LLAMA, tmp_path / "source")
    own.save(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_fingerprint.json").unlink()
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["vocab_size"] < own.vocab_size  # a model that says nothing, with what its tokenizer says
    import_model(tmp_path / "source", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", format="llama")
    folders = [tmp_path / "source", tmp_path / "run" / "tokenizer", tmp_path / "out"]
    assert [find_template(each) for each in folders] == [own.chat_template] * 3
    loaded = load_tokenizer(tmp_path / "run" / "tokenizer")
    made = make_tokenizer(DataConfig(tokenizer=str(tmp_path / "run" / "tokenizer" / "tokenizer.json")))
    expected = chat_format("auto", own).encode(SAID).tokens.tolist()
    assert [chat_format("auto", each).encode(SAID).tokens.tolist() for each in (loaded, made)] == [expected] * 2
    assert loaded.fingerprint() == made.fingerprint() == own.fingerprint()
    # and rows of it
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Hi", "response": "Yo!"}))
    data = DataConfig(source="arithmetic:2", validation=str(tmp_path / "a.jsonl"), template="auto", sequence_length=40)
    packed = prepare(data, loaded, "validation")
    assert packed.weights is not None
    text = spelled(own, packed.tokens[0], packed.weights[0])
    assert text.startswith("<s>[INST] Hi [/INST]⟦ Yo!</s>⟧")
