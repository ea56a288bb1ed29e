"""Tokenizers made of plain vocabularies."""

import json
from pathlib import Path

import gguf
import pytest

from phyla.models.errors import UserError
from phyla.models.formats.gguf import read_vocabulary
from phyla.models.formats.vocabulary import SPACE, sentencepiece
from phyla.training.data.tokenizers import HuggingFaceTokenizer, train_bpe

TEXT = "It is a truth universally acknowledged, that a single man in possession of 4321 pounds\n\n  must  want é 🦊!"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    SPACE,
    *"abcdeht",
    "he",
    "th",
    "the",
    f"{SPACE}t",
    f"{SPACE}the",
    f"{SPACE}th",
    "ab",
    "bc",
    "abc",
    "cd",
    "eat",
]
SCORES = [0.0] * 259 + [-30.0] * 8 + [-2.0, -1.0, -4.0, -0.5, -6.0, -9.0, -3.0, -2.5, -8.0, -1.5, -7.0]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]


def greedy(text):
    """SentencePiece as it is described: merge the neighbours whose union scores best, the leftmost first."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    parts = list(SPACE + text.replace(" ", SPACE))
    while True:
        best = None
        for i in range(len(parts) - 1):
            union = ids.get(parts[i] + parts[i + 1])
            if union is not None and (best is None or SCORES[union] > best[0]):
                best = SCORES[union], i
        if best is None:
            break
        i = best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@pytest.mark.parametrize("text", ["the", "abcd eat the theabc  hethe", "eé\n the🦊 bcde", "", "<s>the"])
def test_sentencepiece_against_its_definition(text):
    assert len(SCORES) == len(TOKENS)
    tokenizer = HuggingFaceTokenizer(sentencepiece(TOKENS, SCORES, 0, [1, 2]), 1, 2)
    assert tokenizer.encode(text).tolist() == (greedy(text) if text else [])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def fields(**said):
    return {f"tokenizer.ggml.{name}": value for name, value in said.items()}


def test_gguf_s_byte_level_vocabulary():
    """Equal to the tokenizer that it was taken from."""
    trained = train_bpe([TEXT * 3], 300)
    model = json.loads(trained.to_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(pair) for pair in model["merges"]]
    kinds = [int(gguf.TokenType.CONTROL)] + [int(gguf.TokenType.NORMAL)] * (len(tokens) - 1)
    said = fields(model="gpt2", pre="gpt-2", tokens=tokens, merges=merges, token_type=kinds, bos_token_id=0)
    found = read_vocabulary(said)
    assert found is not None
    tokenizer = HuggingFaceTokenizer(*found[:3])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    assert tokenizer.encode(TEXT).tolist() == trained.encode(TEXT).tolist()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    digits = HuggingFaceTokenizer(*(read_vocabulary(said | fields(pre="smollm")) or found)[:3])
    assert [digits.decode([i]) for i in digits.encode("4321")] == list("4321")


def test_gguf_s_other_vocabularies():
    said = fields(model="llama", tokens=TOKENS, scores=SCORES, token_type=[2, 3, 3] + [6] * 256 + [1] * 19)
    found = read_vocabulary(said | fields(bos_token_id=1, eos_token_id=2))
    assert found is not None
    assert HuggingFaceTokenizer(*found[:3]).encode("the eat").tolist() == greedy("the eat")
    assert read_vocabulary({}) is None
    for change, message in (
        (fields(model="bert", bos_token_id=1), "tokenizer.ggml.model is 'bert'; supported: 'gpt2', 'llama'"),
        (
            fields(model="gpt2", pre="gpt2-odd", merges=[], bos_token_id=1),
            "no pre-tokenizer 'gpt2-odd'; nearest: gpt-2",
        ),
        ({}, "bos_token_id and eos_token_id are both absent"),
        (fields(tokens=["a", "b", "a"], scores=[0.0] * 3, token_type=[1] * 3, bos_token_id=1), "token 'a' twice"),
    ):
        with pytest.raises(UserError, match=message):
            read_vocabulary(said | change)


STORIES = Path(__file__).parents[4] / "shared" / "data" / "stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")
def test_llama2c_s_vocabulary():
    from phyla.models.formats.llama2c import read_vocabulary

    found = read_vocabulary(STORIES / "stories260K.bin", 512)
    assert found is not None
    tokenizer = HuggingFaceTokenizer(*found[:3])
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert [tokenizer.decode([i]) for i in tokenizer.encode("Lily was happy.")] == ["Lily", "was", "happy", "."]
