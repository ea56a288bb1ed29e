import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phyla.training.data import sources
from phyla.training.data.config import DataConfig
from phyla.training.data.sources import austen, documents, stream

DATA = Path(sources.__file__).parent


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": i, field: text}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


def test_splitting_austen_loses_no_byte():
    novels = austen()
    text = "".join(novels.values()).encode()
    noted = re.findall(r"\| ([\d,]+) \| `([0-9a-f]{64})` \|", (DATA / "austen.md").read_text())
    packed = (DATA / "austen.txt.xz").read_bytes()
    assert noted == [(f"{len(raw):,}", hashlib.sha256(raw).hexdigest()) for raw in (packed, text)]
    assert [len(novel) > 400_000 for novel in novels.values()] == [True] * 6
    openings = {title: " ".join(novel[:2000].split()) for title, novel in novels.items()}
    for title, words in {
        "EMMA": "Emma Woodhouse, handsome, clever, and rich",
        "MANSFIELD PARK": "Miss Maria Ward, of Huntingdon",
        "NORTHANGER ABBEY": "No one who had ever seen Catherine Morland",
        "Persuasion": "Sir Walter Elliot, of Kellynch Hall",
        "PRIDE AND PREJUDICE": "It is a truth universally acknowledged",
        "SENSE AND SENSIBILITY": "The family of Dashwood had long been settled in Sussex",
    }.items():
        assert openings[title].startswith(title)
        assert words in openings[title]


def test_persuasion_is_held_out():
    train, validation = documents(DataConfig(), "train"), documents(DataConfig(), "validation")
    assert list(validation) == [austen()["Persuasion"]]
    assert [text.split("\n", 1)[0] for text in train] == [title for title in sources.NOVELS if title != "Persuasion"]
    seen = {line for text in train for line in text.splitlines()}
    long_lines = [line for line in validation[0].splitlines() if len(line) > 50]  # pyright: ignore[reportIndexIssue]
    assert len(long_lines) > 5000
    assert not [line for line in long_lines if line in seen]
    assert list(documents(DataConfig(streaming=True), "train")) == list(train)


def test_text_files_are_documents_in_order_of_name(tmp_path):
    texts = {f"{i:02d}.txt": f"text {i}\r\nsecond line é\n" for i in range(20)}
    for name, text in reversed(texts.items()):
        (tmp_path / name).write_bytes(text.encode())
    config = DataConfig(source=f"{tmp_path}/*.txt", validation_fraction=0.15)
    assert list(documents(config, "train")) == list(texts.values())[:17]
    assert list(documents(config, "validation")) == list(texts.values())[17:]
    # a validation source of its own leaves the training documents whole
    both = DataConfig(source=f"{tmp_path}/0*.txt", validation=f"{tmp_path}/1*.txt")
    assert list(documents(both, "train")) == list(texts.values())[:10]
    assert list(documents(both, "validation")) == list(texts.values())[10:]
    assert list(documents(DataConfig(source=f"{tmp_path}/00.txt", validation="austen"), "validation")) == [
        austen()["Persuasion"]
    ]


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_a_single_document_is_split_at_a_line(tmp_path, fraction):
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    config = DataConfig(source=str(tmp_path / "one.txt"), validation_fraction=fraction)
    (train,), (validation,) = documents(config, "train"), documents(config, "validation")
    assert train + validation == text
    assert train.endswith("\n")
    assert len(validation) / len(text) == pytest.approx(fraction, abs=0.002)


def test_two_documents_give_one_each(tmp_path):
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", ["one", "two"])), validation_fraction=0.99)
    assert documents(config, "train") == ["one"]
    assert documents(config, "validation") == ["two"]


def test_json_lines(tmp_path):
    texts = ["plain", "with\nline\u2028breaks", "é日本", "", "last"]
    path = write_jsonl(tmp_path / "a.jsonl", texts, field="content")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n").rstrip(b"\n"))  # blank lines, no newline at the end
    config = DataConfig(source=str(path), text_field="content", validation="austen")
    assert documents(config, "train") == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "bad.jsonl:2: not a line of JSON"),
        ('["a"]', "bad.jsonl:2: a line must be a JSON object, not list"),
        ('{"body": "a"}', "bad.jsonl:2: no field 'text' (data.text_field), it has 'body'"),
        ('{"text": 3}', "bad.jsonl:2: field 'text' must be a string, not int"),
        ('{"text": "\\ud800"}', "bad.jsonl:2: field 'text' is not valid Unicode"),
        (b'{"text": "\xff"}', "bad.jsonl:2: not UTF-8 text (byte 10)"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_line_is_named(tmp_path, line, message, streaming):
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + raw + b"\n")
    config = DataConfig(source=str(tmp_path / "bad.jsonl"), validation="austen", streaming=streaming)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        list(documents(config, "train"))
    assert "\n" not in str(error.value)


def test_bad_paths_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "line.txt").write_text("no line break")
    (tmp_path / "empty.jsonl").write_text("\n")
    for source, message in {
        f"{tmp_path}/*.md": f"data.source: no file matches '{tmp_path}/*.md'",
        "austin": "data.source: no file matches 'austin' (a source is 'austen', ",
        str(tmp_path): f"data.source: {tmp_path} is a folder; write '{tmp_path}/*.txt' or 'hf:{tmp_path}'",
        f"{tmp_path}/latin.txt": "latin.txt: not UTF-8 text (byte 3)",
        f"{tmp_path}/line.txt": "is one document without a line to split it at, name data.validation",
        f"{tmp_path}/empty.jsonl": "holds no document",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            documents(DataConfig(source=source), "train")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.validation: no file matches"):
        documents(DataConfig(validation="nowhere.txt"), "validation")


@pytest.mark.usefixtures("quiet_datasets")
def test_datasets_folder(tmp_path):
    train, held = [f"document {i} é" for i in range(40)], ["held", "out"]
    write_jsonl(tmp_path / "set" / "train-0.jsonl", train[:25])
    write_jsonl(tmp_path / "set" / "train-1.jsonl", train[25:])
    write_jsonl(tmp_path / "set" / "validation.jsonl", held)
    name = f"hf:{tmp_path}/set"
    for streaming in (False, True):
        config = DataConfig(source=name, validation=f"{name}#validation", streaming=streaming)
        assert list(documents(config, "train")) == train
        assert list(documents(config, "validation")) == held
    assert list(documents(DataConfig(source=name), "train")) == train[:38]
    assert list(documents(DataConfig(source=f"{name}@default#validation"), "train")) == ["held"]

    for config, message in {
        DataConfig(source=name, text_field="body"): "has no column 'body' (data.text_field), it has 'n', 'text'",
        DataConfig(source=name, text_field="n"): "field 'n' must be a string, not int",
        DataConfig(source=f"{name}#test"): "data.source: cannot load",
        DataConfig(source=f"hf:{tmp_path}/absent"): "data.source: cannot load",
        DataConfig(source=f"{name}@other"): "data.source: cannot load",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            documents(config, "train")
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("quiet_datasets")
def test_a_stream_goes_on_where_it_was_left(tmp_path):
    for k in range(3):
        write_jsonl(tmp_path / "set" / f"train-{k}.jsonl", [f"document {k} {i} é" for i in range(7)])
        (tmp_path / f"{k}.txt").write_text(f"text {k}")
    for source in ("austen", f"{tmp_path}/*.txt", f"{tmp_path}/set/*.jsonl", f"hf:{tmp_path}/set"):
        config = DataConfig(source=source, validation=f"{tmp_path}/0.txt", streaming=True)
        pairs = list(stream(config, "train"))
        assert len(pairs) in (3, 5, 21)
        for i, (_, position) in enumerate(pairs):
            rest = list(stream(config, "train", json.loads(json.dumps(position))))
            assert [text for text, _ in rest] == [text for text, _ in pairs[i + 1 :]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length must be at least 1, not 0"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer must be at least 1, not 0"),
        ({"validation_fraction": 0.0}, "data.validation_fraction must lie between 0 and 1"),
        ({"validation_fraction": float("nan")}, "data.validation_fraction must lie between 0 and 1"),
        ({"text_field": ""}, "data.text_field must name a field"),
        ({"source": ""}, "data.source must be 'austen', a text file"),
        ({"validation": "hf:"}, "data.validation must be 'austen', a text file"),
        ({"validation": "austen"}, "data.validation must differ from data.source"),
        ({"source": "x.txt", "streaming": True}, "data.validation must name a source when data.streaming is on"),
        ({"tokenizer": "byte"}, "data.tokenizer must be 'bytes', 'bpe:SIZE' or the path of a tokenizer.json"),
        ({"tokenizer": "bpe:256"}, "a SIZE of at least 257"),
        ({"tokenizer": "bpe:4k"}, "a SIZE of at least 257"),
    ],
)
def test_impossible_values_name_their_field(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        DataConfig(**values)
    assert "\n" not in str(error.value)


def test_the_config_imports_nothing_heavy():
    code = (
        "import sys, phyla.training.data.config\n"
        "print(*{'jax', 'grain', 'datasets', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
