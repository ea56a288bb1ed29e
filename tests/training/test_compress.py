"""Compressed runs: what is written, what is reported of it, and that it is a run like any other."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from phyla.cli import main
from phyla.compression.compress import compress
from phyla.compression.matrices import dotted, weights
from phyla.compression.recipes import parse
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.weights import Weight, materialize
from phyla.training import compress as module
from phyla.training import run
from phyla.training.compress import Calibration, compress_run
from phyla.training.convert import export_model, import_model
from phyla.training.data.pipeline import Packed, prepare
from phyla.training.data.tokenizers import ByteTokenizer
from phyla.training.divergence import divergences
from phyla.training.evaluate import evaluate_run, make_evaluate, score
from phyla.training.generate import generate_run
from phyla.training.logits import write_logits
from phyla.training.loop import train
from phyla.training.objectives import hidden_tokens, masked_token
from phyla.training.saved import load

GREEDY: dict[str, Any] = dict.fromkeys(("top_k", "top_p", "min_p", "json")) | {
    "temperature": 0,
    "seed": 0,
    "max_tokens": 12,
    "stop": [],
}
LLAMA = Path(__file__).parents[1] / "goldens" / "llama"


@pytest.fixture(scope="module")
def compressed(trained, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("compressed") / "out"
    return out, compress_run(trained, parse("magnitude-30%+nf4"), out)


def test_the_figures_are_those_of_plain_computations(trained, compressed):
    out, record = compressed
    assert json.loads((out / "compression.json").read_text()) == record
    first, _, last = record["steps"]
    before, after = load(trained), load(out)
    for row, folder, saved in ((first, trained, before), (last, out, after)):
        assert row["bits_per_byte"] == pytest.approx(
            evaluate_run(folder, json=out / "evaluation.json").bits_per_byte, rel=1e-6
        )
        items = folder / "checkpoints" / str(saved.step)
        files = [path for item in ("params", "frozen") for path in (items / item).rglob("*")]
        assert row["bytes_on_disk"] == sum(path.stat().st_size for path in files if path.is_file())
        assert row["bytes_in_memory"] == sum(leaf.nbytes for leaf in jax.tree.leaves(saved.params))
        assert row["bits_per_weight"] == 8 * row["bytes_in_memory"] / row["parameters"]
        held = weights(saved.model()).values()
        zeros = sum(int((np.asarray(materialize(each)) == 0).sum()) for each in held)
        assert (row["parameters"], row["zeros"]) == (sum(int(np.prod(each.shape)) for each in held), zeros)
    assert first["kl"] == 0
    assert first["agreement"] == 1
    assert last["bytes_in_memory"] < first["bytes_in_memory"] / 2
    assert last["zeros"] / last["parameters"] > 0.15
    # The divergence, from all logits at once.
    packed = prepare(before.experiment.data, before.tokenizer, "validation")
    tokens, segments = packed.tokens, packed.segment_ids
    asked = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    p, q = (said(saved.model(), tokens[:, :-1], segments[:, :-1])[asked] for saved in (before, after))
    assert last["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert last["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert last["kl"] > 0


def said(model: LanguageModel, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    logits = np.asarray(jax.jit(lambda m: m.logits(m(tokens, None, segment_ids)[0]))(model), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_every_parameter_is_accounted_for(trained, compressed):
    _, record = compressed
    names = {".".join(map(str, path)) for path in weights(load(trained).model())}
    assert record["parameters"].keys() | record["left"].keys() == names
    assert not record["parameters"].keys() & record["left"].keys()
    assert record["parameters"]["embedding.weight"]["recipes"] == ["nf4"]
    query = record["parameters"]["periods.blocks.0.mixer.q.weight"]
    assert query["recipes"] == ["magnitude-30%", "nf4"]
    assert query["bits_per_weight"] == pytest.approx(4 + 8 / 16 + 64 / 256)  # of 16 inputs and 16 outputs
    assert "decay" in record["left"]["periods.blocks.1.mixer.dt_proj.weight"]
    coverage = record["coverage"]
    assert coverage.keys() == {"embedding", "norms", "attention", "mlp", "mamba"}
    assert coverage["attention"]["changed"] == 1
    assert coverage["norms"] == {"parameters": 16 * 4, "changed": 0, "bits_per_weight": 32}
    total = sum(row["parameters"] * row["bits_per_weight"] for row in coverage.values())
    assert total == pytest.approx(8 * record["steps"][-1]["bytes_in_memory"])


def test_saved_and_loaded_to_the_bit(trained, compressed):
    out, _ = compressed
    made = compress(load(trained).model(), parse("magnitude-30%+nf4"))[-1].model
    saved = load(out)
    equal(saved.params, nnx.state(made))
    assert saved.step == load(trained).step
    assert any(isinstance(each, Weight) for each in weights(saved.model()).values())


def equal(a: nnx.State, b: nnx.State) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_it_is_a_run_like_any_other(trained, compressed, tmp_path):
    """It speaks, gives logits and can be compressed again, but is not trained on."""
    out, _ = compressed
    (text,) = generate_run(out, ["the quick"], **GREEDY)
    assert isinstance(text, str)
    ids = np.array([[256, *b"the quick"]])
    save_file({"input_ids": ids}, tmp_path / "in.safetensors")
    write_logits(out, tmp_path / "in.safetensors", tmp_path / "out.safetensors", generate_tokens=0)
    model = load(out).model()
    expected = jax.jit(lambda m: m.logits(m(ids)[0]))(model)
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")["logits"], expected, atol=1e-5)
    compress_run(trained, parse("magnitude-30%"), tmp_path / "one")
    compress_run(tmp_path / "one", parse("nf4"), tmp_path / "two")
    equal(load(tmp_path / "two").params, load(out).params)
    assert run.read_record(tmp_path / "two")["compression"] == "magnitude-30%+nf4"
    with pytest.raises(UserError, match="compressed by magnitude-30%\\+nf4, which is not trained on"):
        train(load(out).experiment, out)


@pytest.mark.slow
def test_a_measured_policy_is_recorded_as_what_it_chose(trained, tmp_path):
    """So that the run loads without measuring again."""
    record = compress_run(trained, parse("budget-6@channel"), tmp_path / "out", calibration=Calibration(tokens=500))
    done = run.read_record(tmp_path / "out")["compression"]
    assert "budget" not in done
    assert "int" in done
    assert [row["recipe"] for row in record["steps"]] == [None, "budget-6@channel"]
    held = [each for each in weights(load(tmp_path / "out").model()).values() if isinstance(each, Weight)]
    assert sum(each.nbytes for each in held) * 8 <= 6 * sum(np.prod(each.shape) for each in held)
    found = evaluate_run(tmp_path / "out", json=tmp_path / "evaluation.json").bits_per_byte
    assert found == pytest.approx(record["steps"][-1]["bits_per_byte"], rel=1e-6)


def test_methods_that_read_text_read_what_they_are_told(trained, tmp_path):
    """Another text gives other codes, and the same text the same."""
    (tmp_path / "other.txt").write_text("Pack my box with five dozen liquor jugs. " * 20)
    found = []
    for out, source in (("a", None), ("b", str(tmp_path / "other.txt")), ("c", None)):
        options = Calibration(source=source, tokens=500)
        record = compress_run(trained, parse("sparsegpt-2:4+gptq-int4"), tmp_path / out, calibration=options)
        assert record["calibration"] == {"source": source, "tokens": 500}
        found.append(jax.tree.leaves(load(tmp_path / out).params))
    own, other, again = found
    assert all(np.array_equal(one, two) for one, two in zip(own, again, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(own, other, strict=True))
    dense = materialize(weights(load(tmp_path / "a").model())["periods", "blocks", 0, "mixer", "q", "weight"])
    assert (np.count_nonzero(np.reshape(dense, (-1, 4, dense.shape[-1])), axis=1) <= 2).all()


def test_weights_that_wrap_others_are_saved_and_reported(trained, tmp_path):
    """By the names that the parameters had; what was read, too."""
    options = Calibration(tokens=500)
    record = compress_run(trained, parse("rotate+w8a8-tensor"), tmp_path / "out", calibration=options)
    names = {".".join(map(str, path)) for path in weights(load(trained).model())}
    assert record["parameters"].keys() | record["left"].keys() == names
    query = record["parameters"]["periods.blocks.0.mixer.q.weight"]
    assert query["recipes"] == ["rotate", "w8a8-tensor"]
    assert query["bits_per_weight"] == pytest.approx(8 + (16 * 32 + 16 * 8 + 32) / 256)  # scales, signs, a scale
    assert record["activations"]["periods.blocks.0.mixer.q.weight"]["inputs"] == 16
    assert record["activations"].keys() < names
    assert record["steps"][-1]["kl"] < 0.05
    path = ("periods", "blocks", 0, "mixer", "q", "weight")
    before, after = (materialize(weights(load(folder).model())[path]) for folder in (trained, tmp_path / "out"))
    np.testing.assert_allclose(after, before, atol=0.03 * np.abs(before).max())


def test_an_imported_model_is_exported_dense(tmp_path, capsys):
    """One without a tokenizer, hence without a loss."""
    import_model(LLAMA, tmp_path / "run")
    record = compress_run(tmp_path / "run", parse("int8"), tmp_path / "small")
    assert "bits_per_byte" not in record["steps"][-1]
    export_model(tmp_path / "small", tmp_path / "dense", format=None)
    assert "dense, as int8 left it" in capsys.readouterr().out
    found = []
    for model in (tmp_path / "small", tmp_path / "dense", LLAMA):
        write_logits(model, LLAMA / "io.safetensors", tmp_path / "out.safetensors", generate_tokens=0)
        found.append(load_file(tmp_path / "out.safetensors")["logits"])
    small, dense, original = found
    np.testing.assert_allclose(small, dense, atol=2e-5 * np.abs(dense).max())
    assert 0 < np.abs(small - original).mean() < 0.1 * np.abs(original).mean()


def test_a_smaller_model_is_a_run_like_any_other(trained, tmp_path):
    """Its configuration is its own, its recipes are remembered, and it is compressed further from where it lies."""
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["compress", str(trained), "prune-heads-50%+int8", "--out", str(out)]) == 0
    before, after = load(trained), load(out)
    made = compress(before.model(), parse("prune-heads-50%+int8"))[-1].model
    equal(after.params, nnx.state(made))
    mixer = after.experiment.model.pattern[0].mixer
    assert mixer == AttentionConfig(heads=1, head_dim=8)
    assert run.read_record(out)["compression"] == "prune-heads-50%+int8"
    assert any(isinstance(each, Weight) for each in weights(after.model()).values())
    first, _, last = json.loads((out / "compression.json").read_text())["steps"]
    assert first["parameters"] - last["parameters"] == 4 * 8 * 16  # q, k, v and o of a head
    assert evaluate_run(out, json=tmp_path / "e.json").bits_per_byte == pytest.approx(last["bits_per_byte"], rel=1e-5)
    with pytest.raises(UserError, match=r"prune-neurons-50% takes parts of arrays, and .* is none any more"):
        compress_run(out, parse("prune-neurons-50%"), again)
    compress_run(trained, parse("magnitude-30%+prune-heads-50%"), tmp_path / "dense")
    record = compress_run(tmp_path / "dense", parse("prune-neurons-25%-text+prune-layers-1+int8"), again)
    assert run.read_record(again)["compression"].startswith("magnitude-30%+prune-heads-50%+prune-neurons-25%-text+")
    there = {".".join(map(str, path)) for path in weights(load(again).model())}
    assert record["parameters"].keys() | record["left"].keys() == there
    assert len(load(again).experiment.model.pattern) == 1
    with pytest.raises(UserError, match="which is not trained on"):
        train(load(again).experiment, again)


def test_a_smaller_model_is_exported(tmp_path):
    import_model(LLAMA, tmp_path / "run")
    compress_run(tmp_path / "run", parse("prune-heads-50%+prune-neurons-25%+tie-layers-3"), tmp_path / "tied")
    with pytest.raises(UserError, match="can say what this model is"):
        export_model(tmp_path / "tied", tmp_path / "no", format=None)
    compress_run(tmp_path / "run", parse("prune-heads-50%+prune-neurons-25%"), tmp_path / "small")
    export_model(tmp_path / "small", tmp_path / "dense", format=None)
    found = []
    for model in (tmp_path / "small", tmp_path / "dense"):
        write_logits(model, LLAMA / "io.safetensors", tmp_path / "out.safetensors", generate_tokens=0)
        found.append(load_file(tmp_path / "out.safetensors")["logits"])
    np.testing.assert_allclose(*found, atol=2e-5 * np.abs(found[0]).max())
    small, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "dense", LLAMA))
    for name, share in {"num_attention_heads": 0.5, "num_key_value_heads": 0.5, "intermediate_size": 0.75}.items():
        assert small[name] == share * original[name]


def test_masked_tokens():
    """The loss of an encoder's hidden tokens is that of its evaluation."""
    block = BlockConfig(mixer=AttentionConfig(heads=2, causal=False))
    config = ModelConfig(width=16, layers=1, vocab_size=260, pattern=(block,))
    model = LanguageModel(config, nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 250, (6, 17)).astype(np.int32)
    packed = Packed(tokens=tokens, segment_ids=np.ones_like(tokens), num_tokens=96, num_bytes=96)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    graphdef, params = nnx.split(model)
    mask_id = ByteTokenizer().mask_id
    whole = score(
        make_evaluate(graphdef, functools.partial(masked_token, chunk=1000, mask_id=mask_id)), params, packed, 4, mesh
    )
    ask = functools.partial(hidden_tokens, vocab_size=260, mask_id=mask_id)
    other = compress(model, parse("int4-g2"))[-1].model
    first, second = divergences([model, other], ask, packed, batch_size=4, chunk=7, mesh=mesh)
    assert first.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)
    assert (first.kl, first.agreement) == (0, 1)
    assert second.kl > 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["int8"], "--out must be given"),
        (["--out", "new"], "name at least one method"),
        (["int9", "--out", "new"], "no method 'int9'; nearest: int8"),
        (["int4-g63", "--out", "new"], "int4-g63: a group is a multiple of 2; nearest: int4-g64"),
        (["nf4", "int8", "--out", "new"], "int8 changes nothing in this model: every matrix is quantized already"),
        (["int8@mixer.zz", "--out", "new"], "'mixer.zz' is in no dense parameter's path; nearest: periods"),
        (["int8", "--out", "."], "exists and is not an empty folder"),
        (["gptq-nf4", "--out", "new"], "no method 'gptq-nf4'; nearest: gptq-int4"),
        (["wanda-100%", "--out", "new"], "wanda-100%: more than 0 and less than 100 % can go; nearest: wanda-50%"),
        (["int8", "--tokens", "9", "--out", "new"], "int8 reads no text: leave --calibration and --tokens out"),
        (["prune-experts-50%", "--out", "new"], "it has no experts; what fits: prune-heads-50%, prune-neurons-50%"),
        (["int8", "prune-heads-50%", "--out", "new"], "is none any more: put it before what made it so"),
        (["gptq-int4", "--tokens", "0", "--out", "new"], "--tokens must be at least 1, not 0"),
        (["gptq-int4", "--tokens", "9", "--out", "new"], "9 tokens fill no row of data.sequence_length 16 + 1"),
    ],
)
def test_wrong_arguments(trained, tmp_path, monkeypatch, capsys, arguments, error):
    """One line, exit status 2, nothing written."""
    (tmp_path / "full").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["compress", str(trained), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("phyla compress: ")
    assert error in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_no_run(tmp_path, capsys):
    assert main(["compress", str(tmp_path), "int8", "--out", str(tmp_path / "new")]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert main(["compress", "--list"]) == 0
    assert "magnitude-2:4" in capsys.readouterr().out


def test_errors_by_layer_and_speed(trained, tmp_path, monkeypatch):
    """‖W' - W‖ / ‖W‖ of each layer, in numpy, and both models are timed."""
    monkeypatch.setattr(module, "CONTEXT", 8)
    record = compress_run(trained, parse("int4-g2"), tmp_path / "out", speed=True)
    before, after = (weights(load(folder).model()) for folder in (trained, tmp_path / "out"))
    found = record["errors"]
    assert (tmp_path / "out" / "errors.png").exists()
    for path, weight in before.items():
        old, new = np.asarray(materialize(weight), np.float64), np.asarray(materialize(after[path]), np.float64)
        layers = ((old, new),) if path[0] != "periods" else zip(old, new, strict=True)
        expected = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in layers]
        name = dotted(path).removeprefix("periods.")
        if any(expected):
            np.testing.assert_allclose(found.pop(name), expected, rtol=1e-4)
    assert not found
    assert all(record["steps"][i]["decode"] > 0 for i in (0, 1))
