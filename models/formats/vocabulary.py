"""Tokenizers from the vocabularies that GGUF and llama2.c files hold."""

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from phyla.models.errors import UserError, choose

SPACE = "▁"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, DIGITS = "gpt2", "digits"
SPLITS = {  # llama.cpp's name of how text is split into words: GPT-2's way, that after single digits, or a pattern
    "gpt-2": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "llama-bpe": _LLAMA3 % "1,3",
    "qwen2": _LLAMA3 % "1",
}


def byte_level(
    tokens: Sequence[str], merges: Sequence[str], split: str, special: Sequence[int], added: Sequence[int] = ()
) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019).

    Args:
        tokens: the vocabulary, spelled in GPT-2's characters for bytes; special tokens as they are.
        merges: pairs, the first merged first, each "left right".
        split: a key of SPLITS.
        special: ids of special tokens.
        added: ids of tokens that are found in a text before it is split.

    Raises UserError for an unknown split.
    """
    kind = SPLITS[choose("pre-tokenizer", split, SPLITS)]
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    whole_words = split == "llama-bpe"  # a word of the vocabulary is taken as it is
    core = tokenizers.Tokenizer(BPE(_ids(tokens), pairs, ignore_merges=whole_words))
    if kind in (GPT2, DIGITS):
        steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if kind == DIGITS:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        steps = [
            pre_tokenizers.Split(Regex(kind), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return _with_added(core, tokens, special, added)


def sentencepiece(
    tokens: Sequence[str],
    scores: Sequence[float],
    unknown: int,
    special: Sequence[int],
    *,
    added: Sequence[int] = (),
    space_prefix: bool = True,
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with bytes for unknown characters (Kudo and Richardson 2018).

    It merges the pair whose union has the highest score, which as a list of merges is: every split of a token into
    two tokens, in the order of the tokens' scores.

    Args:
        tokens: the vocabulary, spaces as ▁, bytes as <0x0A>.
        scores: of each.
        unknown: id of the unknown token.
        special: ids of special tokens.
        added: ids of tokens that are found in a text before anything else.
        space_prefix: whether a text gets a space in front.
    """
    ids = _ids(tokens)
    apart = {*special, *added, unknown}
    ranked = sorted((i for i in range(len(tokens)) if i not in apart), key=lambda i: (-scores[i], i))
    merges = []
    for i in ranked:
        splits = ((tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i])))
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    core = tokenizers.Tokenizer(BPE(ids, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    back: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(back)
    return _with_added(core, tokens, [*special, unknown], added)


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise UserError(f"the vocabulary has the token {twice!r} twice")
    return ids


def _with_added(
    core: tokenizers.Tokenizer, tokens: Sequence[str], special: Sequence[int], added: Sequence[int]
) -> tokenizers.Tokenizer:
    core.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted({*special})])
    core.add_tokens([AddedToken(tokens[i], normalized=False) for i in sorted({*added} - {*special})])
    return core
