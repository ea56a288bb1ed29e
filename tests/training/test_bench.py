"""The benchmarks: what they measure, what they write, and the other side's language."""

import json
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from phyla.configs.benchmarks import ARCHITECTURES
from phyla.models import formats, sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.training import machine, sharding
from phyla.training.bench import BATCH, LENGTH, models
from phyla.training.bench.models import PHASES, Architecture, bench_models
from phyla.training.bench.peers import start
from phyla.training.bench.timing import Inference
from phyla.training.config import Experiment, LoopConfig, MeshConfig

BLOCK = BlockConfig(mixer=AttentionConfig(heads=2), channel=GatedMLPConfig())
MODEL = ModelConfig(width=8, layers=1, vocab_size=16, pattern=(BLOCK,), tie_embeddings=False)
ENCODER = ModelConfig(
    width=8, layers=1, vocab_size=16, pattern=(BlockConfig(mixer=AttentionConfig(heads=2, causal=False)),)
)

PEER = """
    import json, sys
    print(json.dumps({"torch": "0", "transformers": "0", "threads": 1}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(request), file=open(LOG, "a"))
        seconds = {"seconds": 100.0}
        answers = {"build": {"parameters": PARAMETERS}, "memory": {"peak": 5}}
        if request["do"] == "decode" and FAILS:
            raise ValueError("no cache")
        print(json.dumps(answers.get(request["do"], seconds)), flush=True)
"""


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """The machine's peak from small products; forgotten afterwards."""
    machine.matmul_peak.cache_clear()
    monkeypatch.setattr(machine, "SIZE", 64)
    yield
    machine.matmul_peak.cache_clear()


@pytest.fixture
def interpreter(tmp_path):
    """Makes an interpreter whose peer answers 100 seconds to everything, and the log of what it was asked."""

    def make(parameters: int, *, fails: bool = False) -> tuple[Path, Path]:
        log, script, python = tmp_path / "log", tmp_path / "peer.py", tmp_path / "python"
        values = {"LOG": repr(str(log)), "PARAMETERS": str(parameters), "FAILS": str(fails)}
        text = textwrap.dedent(PEER)
        for name, value in values.items():
            text = text.replace(name, value)
        script.write_text(text)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
        python.chmod(0o755)
        return python, log

    return make


@pytest.mark.slow
def test_one_round_of_one_architecture(tmp_path, capsys):
    bench_models({"tiny": Architecture(MODEL, None)}, json=tmp_path / "out.json", rounds=1)
    record = json.loads((tmp_path / "out.json").read_text())
    tiny = record["models"]["tiny"]
    assert tiny["parameters"] == sizes.count(MODEL)
    for phase, tokens in PHASES.items():
        assert tiny[phase]["tokens_per_second"] == pytest.approx(tokens / tiny[phase]["seconds"][0])
        assert "ratio" not in tiny[phase]
    flops = 3 * sizes.flops_per_token(MODEL, LENGTH) * BATCH * LENGTH / tiny["train"]["seconds"][0]
    assert tiny["train"]["of_peak"] == pytest.approx(flops / record["peak_flops"])
    assert tiny["peak_memory"] > 4 * 3 * tiny["parameters"]
    shown = capsys.readouterr().out
    assert "tiny" in shown
    assert "PyTorch" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_encoder_is_not_decoded(tmp_path):
    experiment = Experiment(name="encoder", model=ENCODER, objective="masked-token", loop=LoopConfig(batch_size=BATCH))
    inference = Inference(experiment, sharding.make_mesh(MeshConfig(data=1), BATCH))
    assert inference.decode() is None
    assert inference.prefill()() > 0


def test_peers_are_asked_in_turn_and_the_ratio_is_theirs_over_ours(tmp_path, interpreter, capsys):
    python, log = interpreter(sizes.count(MODEL))
    architectures = {"tiny": Architecture(MODEL, "llama"), "alone": Architecture(ENCODER, None)}
    bench_models(architectures, json=tmp_path / "out.json", rounds=2, peers=python)
    record = json.loads((tmp_path / "out.json").read_text())
    tiny, alone = record["models"]["tiny"], record["models"]["alone"]
    for phase in PHASES:
        assert tiny[phase]["peer_seconds"] == [100.0, 100.0]
        assert tiny[phase]["ratio"] == pytest.approx(np.median([100 / each for each in tiny[phase]["seconds"]]))
        assert "ratio" not in alone.get(phase, {})
    assert tiny["peer_peak_memory"] == 5
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert asked[0]["config"] == {"model_type": "llama"} | formats.named("llama").to_config(MODEL)
    rounds = [each["do"] for each in asked[1:]]
    first = ["train", "train", "memory", "prefill", "prefill", "decode", "decode"]  # twice: the second time counts
    assert rounds == first + 2 * [each for each in first if each != "memory"]
    shown = capsys.readouterr().out
    assert "PyTorch" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_pair_of_two_sizes_is_none(tmp_path, interpreter):
    python, _ = interpreter(round(sizes.count(MODEL) * 1.02))
    with pytest.raises(UserError, match=r"tiny has .* no fair pair"):
        bench_models({"tiny": Architecture(MODEL, "llama")}, json=tmp_path / "x", rounds=1, peers=python)


def test_the_last_words_of_a_peer_that_ends(tmp_path, interpreter):
    python, _ = interpreter(sizes.count(MODEL), fails=True)
    with pytest.raises(UserError, match=r"--peers .*python: ValueError: no cache$"):
        bench_models({"tiny": Architecture(MODEL, "llama")}, json=tmp_path / "x", rounds=1, peers=python)
    with pytest.raises(UserError, match=r"--peers .*: No such file"):
        bench_models({}, json=tmp_path / "x", rounds=1, peers=tmp_path / "none")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_what_its_peer_is(name):
    """Of the same size class, and in the peer's format exactly."""
    model, peer = ARCHITECTURES[name]()
    assert (model.width, model.layers, model.vocab_size) == (256, 4, 4096)
    assert 2e6 < sizes.count(model) < 12e6
    if peer is not None:
        formats.check_expressible(formats.named(peer), model)


@pytest.mark.slow
@pytest.mark.skipif("PHYLA_PEERS" not in os.environ, reason="PHYLA_PEERS names no Python that has torch")
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if ARCHITECTURES[name]().peer])
def test_the_peers_themselves(name, tmp_path):
    model, peer = ARCHITECTURES[name]()
    layout = formats.named(str(peer))
    config = {"model_type": layout.name} | layout.to_config(model)
    with start(Path(os.environ["PHYLA_PEERS"])) as peers:
        built = peers.ask("build", config=config, batch=1, length=64)
        assert built["parameters"] == pytest.approx(sizes.count(model), rel=models.TOLERANCE)
        assert peers.ask("train")["seconds"] > 0
        assert peers.ask("memory")["peak"] > 12 * built["parameters"]
        assert peers.ask("prefill")["seconds"] > 0
        if name != "bert":
            assert peers.ask("decode", prompt=8, tokens=4)["seconds"] > 0
