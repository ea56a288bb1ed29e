"""PEFT's folders: out, and in again to the bit."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from phyla.cli import main
from phyla.compression.compress import compress
from phyla.compression.recipes import parse
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.models.weights import trainable
from phyla.training import run
from phyla.training.checkpoints import Checkpoints
from phyla.training.config import Experiment
from phyla.training.convert import import_model
from phyla.training.peft import export_peft, import_peft
from phyla.training.saved import load
from phyla.training.step import split

BLOCK = BlockConfig(mixer=AttentionConfig(heads=2, kv_heads=1), channel=GatedMLPConfig(expand=2.0))
MODEL = ModelConfig(width=16, layers=2, vocab_size=23, pattern=(BLOCK,), tie_embeddings=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "base"
    run.create(folder, Experiment(name="llama", model=MODEL), None)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_params(split(LanguageModel(MODEL, nnx.Rngs(0)))[1])
    return folder


def adapted(base, out, name):
    """A run of the adapter, as if it were trained."""
    experiment = dataclasses.replace(load(base).experiment, base=str(base), recipes=name)
    model = compress(load(base).model(), parse(name))[-1].model
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, trainable)):
        variable[...] = variable[...] + rng.standard_normal(variable.shape, np.float32)
    run.create(out, experiment, None, compression=parse(name))
    with Checkpoints(out, frozen=False) as checkpoints:
        checkpoints.save_params(split(model)[1])
    return model


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("lora-r2-a16@mixer", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("rslora-r3@down", ["down_proj"]),
        ("dora-r2@\\.q\\.", ["q_proj"]),
        ("ia3", ["down_proj", "k_proj", "v_proj"]),
    ],
)
def test_out_and_in_again(llama, tmp_path, name, modules):
    model = adapted(llama, tmp_path / "run", name)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "peft"), "--format", "peft"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert config["target_modules"] == modules
    first = "base_model.model.model.layers.1."
    if name.startswith("lora"):
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 16)
        assert len(tensors) == 2 * 4 * 2
        assert tensors[first + "self_attn.k_proj.lora_A.weight"].shape == (2, 16)
        assert tensors[first + "self_attn.k_proj.lora_B.weight"].shape == (8, 2)
    if name == "ia3":
        assert config["feedforward_modules"] == ["down_proj"]
        assert tensors[first + "mlp.down_proj.ia3_l"].shape == (1, 32)
        assert tensors[first + "self_attn.v_proj.ia3_l"].shape == (8, 1)
    assert main(["import", str(tmp_path / "peft"), str(tmp_path / "back"), "--base", str(llama)]) == 0
    for right, found in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(load(tmp_path / "back").params), strict=True
    ):
        np.testing.assert_array_equal(right, found)


GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def golden_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goldens") / "base"
    import_model(GOLDENS / "llama", folder)
    return folder


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "ia3"])
def test_an_adapter_that_peft_trained_gives_its_logits(golden_base, tmp_path, name):
    """And written again it is the same, to the bit. `check_peft.py` is the other direction."""
    source = GOLDENS / f"llama-{name}"
    import_peft(source, golden_base, tmp_path / "run")
    model, io = load(tmp_path / "run").model(), load_file(source / "io.safetensors")
    found = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))(model, jnp.asarray(io["input_ids"]))
    np.testing.assert_allclose(found, io["logits"], rtol=0, atol=2e-4)
    assert np.abs(io["logits"] - load_file(GOLDENS / "llama" / "io.safetensors")["logits"]).max() > 1
    export_peft(tmp_path / "run", tmp_path / "peft")
    again = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for key, array in load_file(source / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(again.pop(key), array)
    assert not again


def test_what_peft_or_the_base_cannot_say_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="PEFT takes LoRA, DoRA and IA3, and this run ends with no adapter"):
        export_peft(llama, tmp_path / "peft")
    adapted(llama, tmp_path / "run", "lora-r2@\\.q\\.")
    export_peft(tmp_path / "run", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.zeros((2, 16))}, path)
    with pytest.raises(UserError, match=r"layers.7.self_attn.q_proj.lora_A.weight has no place"):
        import_peft(tmp_path / "peft", llama, tmp_path / "in")
    name = min(tensors)
    save_file({key: each for key, each in tensors.items() if key != name}, path)
    with pytest.raises(UserError, match="in every layer"):
        import_peft(tmp_path / "peft", llama, tmp_path / "in")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"bias": "none"', '"bias": "all"'))
    with pytest.raises(UserError, match=r"bias is .all.; supported"):
        import_peft(tmp_path / "peft", llama, tmp_path / "in")
    config.write_text(config.read_text().replace('"bias": "all"', '"alora_invocation_tokens": [1]'))
    with pytest.raises(UserError, match=r"alora_invocation_tokens is \[1\]; supported: null"):
        import_peft(tmp_path / "peft", llama, tmp_path / "in")
