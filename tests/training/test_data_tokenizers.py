import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from phyla.training.data.config import DataConfig
from phyla.training.data.tokenizers import (
    ByteTokenizer,
    check_match,
    encode_document,
    encode_prompt,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)

TEXT = ["It was the best of times, it was the worst of times. ", "Ça va? 日本語 \r\n\t it was the age of wisdom"] * 3
BPE = train_bpe(TEXT, 300)
VOCABULARY = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, "<s>": 4, "</s>": 5, "<start>": 6}

any_text = st.text() | st.sampled_from(["<|endoftext|>", "a<|endoftext|>b", "\r\n", " a ", "\ufeff", "e\u0301"])


def word_level(specials: list[str]) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(specials)
    return core


def from_file(core: tokenizers.Tokenizer, folder):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(core.to_str())
    return make_tokenizer(DataConfig(tokenizer=str(folder / "tokenizer.json")))


@given(st.binary())
def test_any_bytes_come_back(raw):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(raw)
    assert ids.dtype == np.int32
    assert list(ids) == list(raw)
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.decode(ids) == raw.decode(errors="replace")
    assert tokenizer.count_bytes(ids) == len(raw)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(texts=st.lists(any_text, max_size=3))
def test_any_text_comes_back(tokenizer, texts):
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        document, prompt = encode_document(tokenizer, text), encode_prompt(tokenizer, text)
        assert document.dtype == prompt.dtype == np.int32
        assert list(document) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert list(prompt) == [tokenizer.bos_id, *ids]
        assert list(ids) == list(tokenizer.encode(text))
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
        assert all(0 <= i < tokenizer.vocab_size for i in document)
        assert tokenizer.decode(ids) == tokenizer.decode(document) == text
        # byte counts add up wherever the ids are cut, and BOS and EOS count nothing
        counts = [tokenizer.count_bytes(document[i : i + 1]) for i in range(len(document))]
        assert counts[0] == counts[-1] == 0
        assert all(counts[1:-1])
        assert sum(counts) == tokenizer.count_bytes(document) == len(text.encode())


def test_bpe_is_learned_from_the_training_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), validation="austen", tokenizer="bpe:300")
    tokenizer = make_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 0, 0)
    assert tokenizer.fingerprint() == BPE.fingerprint()
    assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0]) // 2
    assert train_bpe(TEXT, 299).fingerprint() != BPE.fingerprint()
    assert train_bpe(["xyz xyz"], 1000).vocab_size < 300  # a short text has few pairs to merge


def test_what_the_post_processor_adds_is_added_once(tmp_path):
    core = word_level(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    tokenizer = from_file(core, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (4, 5, 7)
    assert list(encode_document(tokenizer, "a b c")) == [4, 1, 2, 3, 5]
    assert list(encode_document(tokenizer, "")) == [4, 5]
    assert list(encode_prompt(tokenizer, "a b c")) == [4, 1, 2, 3]
    assert list(encode_prompt(tokenizer, "")) == [4]
    assert [list(ids) for ids in tokenizer.encode_batch(["a b c", ""])] == [[1, 2, 3], []]
    # the name of a special token in a document is text
    assert 4 not in tokenizer.encode("<s> a")
    # beside it a file that says something else: what the post-processor does wins
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "</s>", "eos_token": "<s>"}')
    tokenizer = make_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (4, 5)


@pytest.mark.parametrize(
    ("specials", "said", "expected"),
    [
        (["</s>"], {}, (5, 5)),
        (["<s>"], {}, (4, 4)),
        (["<s>", "</s>"], {}, (4, 5)),
        (["<s>", "</s>", "<start>"], {"bos_token": "<start>", "eos_token": None}, (6, 5)),
        (["<s>", "</s>", "<start>"], {"bos_token": {"content": "<start>"}, "eos_token": "<start>"}, (6, 6)),
        (["<start>"], {"eos_token": "<start>"}, (6, 6)),
    ],
)
def test_tokens_without_a_post_processor(tmp_path, specials, said, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = from_file(word_level(specials), tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    assert list(encode_document(tokenizer, "a b")) == [expected[0], 1, 2, expected[1]]
    # a run holds the tokens without the file that named them
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.bos_id, loaded.eos_id) == expected


def test_a_policy_that_cannot_be_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no special token, such as '<|endoftext|>'".replace("|", r"\|")):
        from_file(word_level([]), tmp_path)
    core = word_level(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", pair="$A $B", special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    with pytest.raises(ValueError, match="puts 2 tokens in front of a text and 0 behind it"):
        from_file(core, tmp_path)


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path):
    core = word_level(["<s>"])
    core.enable_truncation(2)
    core.enable_padding(length=8)
    tokenizer = from_file(core, tmp_path)
    assert list(tokenizer.encode("a b c a b c")) == [1, 2, 3, 1, 2, 3]
    assert [list(ids) for ids in tokenizer.encode_batch(["a", "a b c"])] == [[1], [1, 2, 3]]


def test_bytes_of_a_vocabulary_that_is_not_of_bytes(tmp_path):
    core = word_level(["<s>"])
    core.normalizer = normalizers.Lowercase()
    tokenizer = from_file(core, tmp_path)
    assert tokenizer.count_bytes(encode_document(tokenizer, "A b C")) == len("a b c")


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "bad.json").write_text('{"text": 1}')
    for name, message in {"bad.json": "is not a Hugging Face tokenizer.json", "none.json": "no file"}.items():
        with pytest.raises(ValueError, match=rf"data\.tokenizer: .*{message}") as error:
            make_tokenizer(DataConfig(tokenizer=str(tmp_path / name)))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no tokenizer_fingerprint\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_saved_and_loaded(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    check_match(tokenizer.fingerprint(), loaded.fingerprint())
    assert list(loaded.encode(TEXT[1])) == list(tokenizer.encode(TEXT[1]))
    assert set(loaded.fingerprint()) == {"kind", "sha256", "vocab_size", "bos", "eos"}
    assert (tmp_path / "run" / "tokenizer.json").exists() == (tokenizer is BPE)


def test_a_mismatch_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=re.escape("expected (kind bytes, sha256 ")) as error:
        check_match(ByteTokenizer().fingerprint(), BPE.fingerprint())
    assert "vocab_size 257, bos 256, eos 256), found (kind tokenizer.json, sha256 " in str(error.value)
    assert "\n" not in str(error.value)

    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    changed = json.loads(path.read_text())
    changed["model"]["merges"].pop()
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="the tokenizer is not the one of this run"):
        load_tokenizer(tmp_path)
