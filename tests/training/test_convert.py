"""Foreign models as runs, runs as foreign models, and what either says of given tokens."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phyla.cli import main
from phyla.models.errors import UserError
from phyla.training import run
from phyla.training.convert import export_model, import_model
from phyla.training.data.tokenizers import train_bpe
from phyla.training.generate import generate_run
from phyla.training.logits import write_logits
from phyla.training.loop import train

GOLDENS = Path(__file__).parents[1] / "goldens"
LLAMA, BERT = GOLDENS / "llama", GOLDENS / "bert"


def folder_with_tokenizer(path):
    """The Llama fixture (64 words) and a tokenizer.json of 64 words."""
    shutil.copytree(LLAMA, path)
    core = json.loads(train_bpe(["the quick brown fox"], 257).to_json())
    core["model"]["merges"] = []
    letters = [token for token in core["model"]["vocab"] if len(token) == 1 and token.isascii() and token.islower()] + [
        "Ġ"
    ]
    core["model"]["vocab"] = {token: i for i, token in enumerate(["<|endoftext|>", *letters])}
    (path / "tokenizer.json").write_text(json.dumps(core))
    return path


def test_a_run_says_what_the_foreign_folder_says(tmp_path, capsys):
    importing = ["import", str(LLAMA), str(tmp_path / "run")]
    assert main(importing) == 0
    assert "no tokenizer" in capsys.readouterr().out
    for model in (tmp_path / "run", LLAMA):
        options = ["--input", str(LLAMA / "io.safetensors"), "--output", str(tmp_path / "out.safetensors")]
        assert main(["logits", str(model), *options, "--generate", "16"]) == 0
        found, expected = load_file(tmp_path / "out.safetensors"), load_file(LLAMA / "io.safetensors")
        assert found.keys() == {"logits", "generated"}
        assert found["logits"].dtype == np.float32
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=2e-4)
        np.testing.assert_array_equal(found["generated"], expected["generated"])
    assert main(importing) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    for command in (["generate", str(tmp_path / "run"), "--prompt", "a"], ["evaluate", str(tmp_path / "run")]):
        assert main(command) == 2
        assert "has no tokenizer: the model was imported" in capsys.readouterr().err


def test_an_encoder_says_its_last_hidden_state(tmp_path):
    out = tmp_path / "out.safetensors"
    write_logits(BERT, BERT / "io.safetensors", out, generate_tokens=0)
    found, expected = load_file(out), load_file(BERT / "io.safetensors")
    assert found.keys() == {"last_hidden_state"}
    seen = expected["attention_mask"].astype(bool)
    assert not seen.all()
    difference = found["last_hidden_state"][seen] - expected["last_hidden_state"][seen]
    assert np.abs(difference).max() < 2e-4
    with pytest.raises(UserError, match="is an encoder"):
        write_logits(BERT, BERT / "io.safetensors", out, generate_tokens=3)


def test_left_padding_changes_nothing(tmp_path):
    io = load_file(LLAMA / "io.safetensors")
    ids, mask = io["input_ids"], np.ones_like(io["input_ids"])
    zeros = np.zeros((len(ids), 4), ids.dtype)
    padded = {"input_ids": np.concatenate([zeros, ids], 1), "attention_mask": np.concatenate([zeros, mask], 1)}
    save_file(padded, tmp_path / "in.safetensors")
    write_logits(LLAMA, tmp_path / "in.safetensors", tmp_path / "out.safetensors", generate_tokens=16)
    found = load_file(tmp_path / "out.safetensors")
    np.testing.assert_allclose(found["logits"][:, 4:], io["logits"], rtol=0, atol=2e-4)
    np.testing.assert_array_equal(found["generated"], io["generated"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": np.zeros((1, 2), np.int32)}, "has no input_ids, only ids"),
        ({"input_ids": np.zeros((1, 2), np.float32)}, r"input_ids must be integers \[B, T\], not float32 \[1, 2\]"),
        ({"input_ids": np.full((1, 2), 64)}, r"input_ids must be in \[0, 64\), not 64 … 64"),
        (
            {"input_ids": np.zeros((1, 2), np.int32), "attention_mask": np.ones((1, 3), np.int32)},
            r"attention_mask is \[1, 3\], input_ids \[1, 2\]",
        ),
    ],
)
def test_wrong_input_is_named(given, message, tmp_path):
    save_file(given, tmp_path / "in.safetensors")
    with pytest.raises(UserError, match=message):
        write_logits(LLAMA, tmp_path / "in.safetensors", tmp_path / "out.safetensors", generate_tokens=0)


def test_a_tokenizer_comes_along_both_ways(tmp_path):
    source = folder_with_tokenizer(tmp_path / "source")
    import_model(source, tmp_path / "run")
    sampling = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0, "stop": []}
    (text,) = generate_run(tmp_path / "run", ["the fox"], max_tokens=5, json=None, **sampling)
    export_model(tmp_path / "run", tmp_path / "out", format="llama")
    flags = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (flags["bos_token_id"], flags["eos_token_id"]) == (0, 0)
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["bos_token"] == said["eos_token"] == "<|endoftext|>"
    import_model(tmp_path / "out", tmp_path / "again")
    assert generate_run(tmp_path / "again", ["the fox"], max_tokens=5, json=None, **sampling) == [text]
    records = [run.read_record(tmp_path / name) for name in ("run", "again")]
    assert records[0]["tokenizer"] == records[1]["tokenizer"]
    assert records[0]["experiment"]["model"] == records[1]["experiment"]["model"]


def test_a_trained_run_is_exported_and_comes_back(experiment, tmp_path, capsys):
    mamba = dataclasses.replace(experiment.model, pattern=experiment.model.pattern[1:])
    experiment = dataclasses.replace(experiment, model=mamba)
    train(experiment, tmp_path / "run", max_steps=2)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "out: mamba; its tokenizer is bytes" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "no"), "--format", "gpt2"]) == 2
    assert "GPT-2 has attention" in capsys.readouterr().err
    save_file({"input_ids": np.arange(20).reshape(2, 10)}, tmp_path / "in.safetensors")
    for model in ("run", "out"):
        out = tmp_path / f"{model}.safetensors"
        write_logits(tmp_path / model, tmp_path / "in.safetensors", out, generate_tokens=0)
    found = [load_file(tmp_path / f"{model}.safetensors")["logits"] for model in ("run", "out")]
    np.testing.assert_array_equal(found[0], found[1])


MEMORY = """
import sys
from pathlib import Path
from phyla.training.convert import import_model
def peak():  # getrusage's would count the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
import_model(Path(sys.argv[1]), Path(sys.argv[3]) / "small")
before = peak()
import_model(Path(sys.argv[2]), Path(sys.argv[3]) / "large")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_import_needs_less_memory_than_the_checkpoint(tmp_path):
    """Over what it takes to import a small one; the limit is 1.3 times the checkpoint."""
    large = tmp_path / "source"
    large.mkdir()
    flags = json.loads((LLAMA / "config.json").read_text())
    width, hidden, layers, vocab = 384, 1024, 20, 4096
    flags |= {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    flags |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64}
    (large / "config.json").write_text(json.dumps(flags))
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{part}_proj": (width, width) for part in "qkvo"}
        shapes |= {f"{layer}mlp.{part}_proj": (hidden, width) for part in ("gate", "up")}
        shapes |= {f"{layer}{part}_layernorm": (width,) for part in ("input", "post_attention")}
        shapes[f"{layer}mlp.down_proj"] = width, hidden
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, large / "model.safetensors")
    command = [sys.executable, "-c", MEMORY, str(LLAMA), str(large), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True
    )
    size = (large / "model.safetensors").stat().st_size
    assert size > 100e6
    assert int(done.stdout.splitlines()[-1]) < 1.3 * size
