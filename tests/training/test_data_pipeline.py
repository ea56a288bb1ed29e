import itertools
import json
import re

import grain
import grain.checkpoint
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phyla.training.data.config import DataConfig
from phyla.training.data.pipeline import RowPacker, prepare, train_iterator
from phyla.training.data.tokenizers import ByteTokenizer, train_bpe

TEXTS = [f"{'Ça va? ' * (i % 5)}document {i}, 日本語 and the rest of it.\n" for i in range(60)]
BYTES = ByteTokenizer()
BPE = train_bpe(TEXTS, 300)


@pytest.fixture(params=["memory", "jsonl stream", "datasets stream"])
def config(request, tmp_path, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    for k in range(2):
        # the empty document has nothing to predict
        lines = [json.dumps({"text": text}) + "\n" for text in [*TEXTS[30 * k : 30 * k + 30], ""]]
        (tmp_path / "set" / f"{k}.jsonl").write_text("".join(lines))
    (tmp_path / "held.txt").write_text("".join(TEXTS))
    return DataConfig(
        source=f"hf:{tmp_path}/set" if request.param == "datasets stream" else f"{tmp_path}/set/*.jsonl",
        validation=str(tmp_path / "held.txt"),
        streaming=request.param != "memory",
        shuffle_buffer=16,
        sequence_length=31,
    )


def write(tmp_path, texts, **values) -> DataConfig:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source="austen", validation=str(tmp_path / "a.jsonl"), **values)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(batches, others):
    return len(batches) == len(others) and all(
        np.array_equal(a[key], b[key])
        for a, b in zip(batches, others, strict=True)
        for key in ("tokens", "segment_ids")
    )


def predictions(tokens_RxT1, segment_ids_RxT1):
    """(input, target) of every target that counts, row by row."""
    inputs, targets = tokens_RxT1[:, :-1], tokens_RxT1[:, 1:]
    counts = (segment_ids_RxT1[:, 1:] == segment_ids_RxT1[:, :-1]) & (segment_ids_RxT1[:, 1:] != 0)
    return list(zip(inputs[counts].tolist(), targets[counts].tolist(), strict=True))


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12), row_length=st.integers(2, 14))
def test_every_token_is_predicted_once_and_segments_never_mix(lengths, row_length):
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]
    rows = list(RowPacker(({"tokens": document} for document in documents), row_length))
    tokens = np.stack([row["tokens"] for row in rows])
    segment_ids = np.stack([row["segment_ids"] for row in rows])
    assert tokens.dtype == segment_ids.dtype == np.int32
    assert tokens.shape[1] == row_length

    # ids are all different, so the pairs say that each document is read in order, whole, and alone
    assert predictions(tokens, segment_ids) == [(i - 1, i) for document in documents for i in document[1:].tolist()]

    document_of = np.searchsorted(ends, tokens, side="right")
    for row, segments, owners in zip(tokens, segment_ids, document_of, strict=True):
        used = segments > 0
        assert segments[0] == 1
        assert not row[~used].any()
        assert set(np.diff(segments[used]).tolist()) <= {0, 1}
        assert np.array_equal(np.diff(owners[used]) != 0, np.diff(segments[used]) != 0)
    assert (segment_ids[:-1] > 0).all()  # padding in the last row only


def test_prepare_counts_tokens_and_bytes(tmp_path):
    texts = ["", *TEXTS, ""]  # an empty document has nothing to predict
    for tokenizer in (BYTES, BPE):
        packed = prepare(write(tmp_path, texts, sequence_length=16), tokenizer, "validation")
        expected = [pair for text in TEXTS for pair in pairs_of(tokenizer, text)]
        assert predictions(packed.tokens, packed.segment_ids) == expected
        assert packed.num_tokens == len(expected)
        assert packed.num_bytes == sum(len(text.encode()) for text in TEXTS)
        assert packed.bytes_per_token == packed.num_bytes / packed.num_tokens
    assert prepare(DataConfig(), BYTES, "train", max_tokens=1000).bytes_per_token == 1.0


def pairs_of(tokenizer, text):
    ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
    return list(itertools.pairwise(ids))


# the last token of the first document, its EOS, and the first token of the next document
BORDERS = [len(tokenizer.encode(TEXTS[0])) + i for tokenizer in (BYTES, BPE) for i in range(3)]


@pytest.mark.parametrize("max_tokens", [1, 5, 16, 17, 100, 101, *BORDERS, 10**6])
def test_a_truncated_split_knows_its_bytes(tmp_path, max_tokens):
    config = write(tmp_path, TEXTS, sequence_length=16)
    for tokenizer in (BYTES, BPE):
        whole = [pair for text in TEXTS for pair in pairs_of(tokenizer, text)]
        packed = prepare(config, tokenizer, "validation", max_tokens)
        covered = [pair for batch in packed.batches(4) for pair in predictions(batch["tokens"], batch["segment_ids"])]
        assert covered == whole[:max_tokens]
        assert packed.num_tokens == len(covered)
        if tokenizer is BYTES:
            assert packed.num_bytes == sum(target < 256 for _, target in covered)
        else:  # the rest of the text makes up the rest of the bytes, wherever a character is cut
            rest = sum(tokenizer.count_bytes(np.asarray([target])) for _, target in whole[max_tokens:])
            assert packed.num_bytes == sum(len(text.encode()) for text in TEXTS) - rest
            assert packed.num_bytes == len("".join(TEXTS).encode()[: packed.num_bytes])


def test_the_last_validation_batch_is_filled_up(tmp_path):
    config = write(tmp_path, TEXTS, sequence_length=20)
    packed = prepare(config, BYTES, "validation")
    batches = list(packed.batches(50))
    assert len(packed.tokens) % 50
    assert {batch["tokens"].shape for batch in batches} == {(50, 21)}
    joined = np.concatenate([batch["tokens"] for batch in batches])
    segment_ids = np.concatenate([batch["segment_ids"] for batch in batches])
    assert np.array_equal(joined[: len(packed.tokens)], packed.tokens)
    assert np.array_equal(segment_ids[: len(packed.tokens)], packed.segment_ids)
    assert not segment_ids[len(packed.tokens) :].any()
    shards = [packed.batches(50, process_index, 5) for process_index in range(5)]
    assert same([stack(parts) for parts in zip(*shards, strict=True)], batches)


def stack(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_too_little_text_is_refused(tmp_path, config):
    for texts, count in (["short"], 7), (["", ""], 0):
        with pytest.raises(
            ValueError,
            match=rf"data\.sequence_length \+ 1 = 513 tokens make a row, the validation text has only {count}$",
        ):
            prepare(write(tmp_path, texts), BYTES, "validation")
        source = DataConfig(source=f"{tmp_path}/a.jsonl", validation="austen", streaming=config.streaming)
        with pytest.raises(ValueError, match=rf"the train text has only {count}$"):
            train_iterator(source, BYTES, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, not 0"):
        prepare(config, BYTES, "train", max_tokens=0)


def test_batches_have_the_promised_form(config):
    batch = next(train_iterator(config, BYTES, batch_size=4, seed=0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((4, 32), np.int32),
        "segment_ids": ((4, 32), np.int32),
    }
    for values, message in {
        (4, 0, 3): "batch_size 4 must be a positive multiple of the 3 processes",
        (0, 0, 1): "batch_size 0 must be a positive multiple of the 1 processes",
        (4, 2, 2): "process_index 2 must lie in [0, 2)",
    }.items():
        size, index, count = values
        with pytest.raises(ValueError, match=re.escape(message)):
            train_iterator(config, BYTES, batch_size=size, seed=0, process_index=index, process_count=count)
    with pytest.raises(ValueError, match=re.escape("seed must lie in [0, 2**32), not -1")):
        train_iterator(config, BYTES, batch_size=4, seed=-1)


@pytest.mark.parametrize("config", ["memory"], indirect=True)
def test_an_epoch_is_every_row_once_in_a_new_order(config):
    packed = prepare(config, BYTES, "train")
    rows = len(packed.tokens)
    iterator = train_iterator(config, BYTES, batch_size=1, seed=3)
    epochs = [stack(take(iterator, rows)) for _ in range(2)]
    for epoch in epochs:
        assert sorted(map(bytes, epoch["tokens"])) == sorted(map(bytes, packed.tokens))
    assert not np.array_equal(epochs[0]["tokens"], epochs[1]["tokens"])
    assert not np.array_equal(epochs[0]["tokens"], packed.tokens)


@pytest.mark.parametrize("config", ["jsonl stream", "datasets stream"], indirect=True)
def test_a_stream_gives_every_token_once_per_epoch(config):
    # with windows of one row the order is that of the documents, and goes round
    unshuffled = DataConfig(**{**vars(config), "shuffle_buffer": 1})
    seen = stack(take(train_iterator(unshuffled, BYTES, batch_size=2, seed=0), 120))
    once = [pair for text in TEXTS for pair in pairs_of(BYTES, text)]
    found = predictions(seen["tokens"], seen["segment_ids"])
    assert len(found) > 2 * len(once)
    assert found == (once * 3)[: len(found)]
    # the same rows in another order within each window
    shuffled = stack(take(train_iterator(config, BYTES, batch_size=2, seed=0), 8))
    assert sorted(map(bytes, shuffled["tokens"])) == sorted(map(bytes, seen["tokens"][:16]))
    assert not np.array_equal(shuffled["tokens"], seen["tokens"][:16])


def test_order_is_a_function_of_the_seed(config):
    runs = [take(train_iterator(config, BPE, batch_size=4, seed=seed), 12) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_shards_make_up_the_global_batch(config):
    whole = take(train_iterator(config, BYTES, batch_size=6, seed=5), 15)
    for count in (2, 3):
        shards = [
            take(train_iterator(config, BYTES, batch_size=6, seed=5, process_index=p, process_count=count), 15)
            for p in range(count)
        ]
        assert shards[0][0]["tokens"].shape == (6 // count, 32)
        assert same([stack(parts) for parts in zip(*shards, strict=True)], whole)


def test_a_restored_iterator_goes_on_exactly(config):
    iterator = train_iterator(config, BYTES, batch_size=3, seed=7)
    states, batches = [], []
    for _ in range(40):  # several windows, and beyond an epoch
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    other = train_iterator(config, BYTES, batch_size=3, seed=7)
    for step in (0, 39, 1, 5, 6, 17, 31):
        other.set_state(states[step])
        assert other.get_state() == states[step]
        assert same(take(other, 40 - step), batches[step:])
    # the position does not depend on the process either
    half = train_iterator(config, BYTES, batch_size=3, seed=7, process_index=2, process_count=3)
    half.set_state(states[17])
    assert np.array_equal(next(half)["tokens"], batches[17]["tokens"][2:])


def test_orbax_keeps_the_position(config, tmp_path):
    iterator = train_iterator(config, BYTES, batch_size=3, seed=7)
    take(iterator, 11)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(
            11,
            args=ocp.args.Composite(
                data=grain.checkpoint.CheckpointSave(iterator),  # pyright: ignore[reportAttributeAccessIssue]
                position=ocp.args.JsonSave(iterator.get_state()),
            ),
        )
        expected = take(iterator, 9)  # while it saves
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        first, second = (train_iterator(config, BYTES, batch_size=3, seed=7) for _ in range(2))
        restored = manager.restore(
            11,
            args=ocp.args.Composite(
                data=grain.checkpoint.CheckpointRestore(first),  # pyright: ignore[reportAttributeAccessIssue]
                position=ocp.args.JsonRestore(),
            ),
        )
    assert same(take(first, 9), expected)
    second.set_state(restored["position"])
    assert same(take(second, 9), expected)
