"""Folders that are not as they should be, and those that are so in another way."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats import fitting, named, open_source
from phyla.models.formats.folder import write_folder
from phyla.models.formats.source import checkpoint_shapes, load
from phyla.models.mixers.attention import AttentionConfig, RopeScaling, rotate
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig

GOLDENS = Path(__file__).parents[2] / "goldens"
DOWN = "model.layers.1.mlp.down_proj.weight"


def read(folder):
    return {path: lazy.read() for path, lazy in load(open_source(folder)).items()}


class Folder:
    """A copy of a fixture that can be spoilt."""

    def __init__(self, path, name):
        self.path = path
        shutil.copytree(GOLDENS / name, path)
        (path / "io.safetensors").unlink()
        self.path.chmod(0o755)
        for file in path.iterdir():
            file.chmod(0o644)
        self.flags = json.loads((path / "config.json").read_text())
        self.tensors = load_file(path / "model.safetensors")

    def write(self):
        (self.path / "config.json").write_text(json.dumps(self.flags))
        save_file(self.tensors, self.path / "model.safetensors")
        return self.path

    def fails(self, message):
        with pytest.raises(UserError, match=message) as caught:
            load(open_source(self.path))
        assert str(self.path) in str(caught.value)


@pytest.fixture
def llama(tmp_path):
    return Folder(tmp_path / "llama", "llama")


def test_a_missing_tensor_is_named(llama):
    shape = list(llama.tensors.pop(DOWN).shape)
    llama.write()
    llama.fails(rf"no tensor {DOWN} \[{shape[0]}, {shape[1]}\]")


def test_a_surplus_tensor_is_named(llama):
    llama.tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
    llama.write()
    llama.fails(r"no place for the tensor model\.layers\.0\.self_attn\.q_proj\.bias")


def test_a_tensor_of_another_shape_is_named(llama):
    llama.tensors[DOWN] = np.ascontiguousarray(llama.tensors[DOWN].T)
    llama.write()
    llama.fails(rf"tensor {DOWN} has shape \[40, 24\]; its configuration says \[24, 40\]")


def test_a_tensor_of_integers_is_named(llama):
    llama.tensors[DOWN] = llama.tensors[DOWN].astype(np.int8)
    with pytest.raises(UserError, match=rf"tensor {DOWN} is I8; supported: F32, F16, BF16"):
        read(llama.write())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden_act": "mish"}, "config.json: hidden_act is 'mish'; supported: 'silu'"),
        ({"model_type": "lama"}, "no format 'lama'; nearest: llama"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; supported: 'default', 'linear', 'llama3'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "unknown flag beta = 1"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "config.json: no factor"),
    ],
)
def test_a_flag_of_an_unknown_value_is_named(llama, flags, message):
    llama.flags |= flags
    with pytest.raises(UserError, match=message):
        open_source(llama.write())


def test_a_missing_flag_is_named(llama):
    del llama.flags["hidden_size"]
    llama.write()
    llama.fails("no hidden_size")
    del llama.flags["model_type"]
    llama.write()
    llama.fails("has no model_type")


class Trap:
    def __reduce__(self):
        return print, ("opened",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt"])
def test_a_pickle_is_refused_and_not_opened(llama, name, capsys):
    (llama.path / "model.safetensors").unlink()
    (llama.path / name).write_bytes(pickle.dumps(Trap()))
    for path in (llama.path, llama.path / name):
        with pytest.raises(UserError, match=rf"{name} is a pickle, which can run any program"):
            open_source(path)
    assert capsys.readouterr().out == ""


def test_what_is_no_model_is_refused(llama, tmp_path):
    for path, message in (
        (tmp_path / "absent", "no file or folder"),
        (tmp_path, "has no config.json"),
        (llama.path / "model.safetensors", "give the folder that has its config.json"),
        (llama.path / "config.json", "neither a Hugging Face folder nor"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(path)
    (llama.path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    llama.fails("not a safetensors file")
    (llama.path / "model.safetensors").unlink()
    llama.fails("has no model.safetensors")
    (llama.path / "config.json").write_text("{")
    llama.fails("is not JSON")


def test_shards_and_their_index(llama, tmp_path):
    expected = read(llama.path)
    model = open_source(llama.path).model
    write_folder(tmp_path / "shards", named("llama"), model, expected, shard_bytes=6000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert set(index["weight_map"].values()) == set(files)
    found = read(tmp_path / "shards")
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, path)

    def fails(message):
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "shards")

    path = tmp_path / "shards" / "model.safetensors.index.json"
    moved = index["weight_map"] | {"lm_head.weight": files[0]}
    path.write_text(json.dumps({"weight_map": moved}))
    fails(f"says that lm_head.weight is in {files[0]}; it is not")
    path.write_text(json.dumps(index))
    (tmp_path / "shards" / files[1]).unlink()
    fails(f"has no {files[1]}, which model.safetensors.index.json names")
    path.unlink()
    fails("safetensors files and no model.safetensors.index.json")


def test_a_tied_head_may_be_there_if_it_is_equal(tmp_path):
    folder = Folder(tmp_path / "tied", "llama-tied")
    expected = read(folder.path)
    head = folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].copy()
    found = read(folder.write())
    assert found.keys() == expected.keys()
    assert "head.weight" not in found
    head[3, 4] += 1
    folder.write()
    folder.fails("lm_head.weight differs from model.embed_tokens.weight")


def test_a_head_that_is_not_tied_must_be_there(tmp_path):
    folder = Folder(tmp_path / "tied", "llama-tied")
    folder.flags["tie_word_embeddings"] = False
    folder.write()
    folder.fails("no tensor lm_head.weight")


def test_names_without_the_prefix_and_with_buffers(tmp_path):
    """As the released GPT-2 is stored."""
    folder = Folder(tmp_path / "gpt2", "gpt2")
    expected = read(folder.path)
    folder.tensors = {name.removeprefix("transformer."): array for name, array in folder.tensors.items()}
    folder.tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    found = read(folder.write())
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_becomes_float32(llama, dtype):
    llama.tensors = {name: array.astype(dtype) for name, array in llama.tensors.items()}
    found = read(llama.write())
    assert found["embedding.weight"].dtype == np.float32
    expected = llama.tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(found["embedding.weight"], expected)


def test_rope_is_read_in_both_spellings():
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    flags = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    flags |= {"intermediate_size": 8, "model_type": "llama"}
    new = flags | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 50.0, **numbers}}
    old = flags | {"rope_theta": 50.0, "rope_scaling": {"rope_type": "llama3", **numbers}}
    model = named("llama").config(new)
    mixer = model.pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    assert (mixer.rope_base, mixer.rope_scaling) == (50.0, RopeScaling(factor=8.0, original_length=32))
    assert named("llama").config(old) == model
    older = flags | {"rope_scaling": {"type": "linear", "factor": 3.0}}
    mixer = named("llama").config(older).pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    assert mixer.rope_scaling == RopeScaling(factor=3.0)


@pytest.mark.parametrize("scaling", [RopeScaling(factor=3.0), RopeScaling(factor=8.0, original_length=64)])
def test_scaled_rotations(scaling):
    """Against the published rule, wavelength by wavelength in float64."""
    half, base, position = 8, 500.0, 29
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 2 * half)).astype(np.float32)
    found = np.asarray(rotate(jnp.asarray(x), jnp.full((1, 1), position), base, scaling))[0, 0, 0]
    for i in range(half):
        frequency = base ** (-i / half)
        if scaling.original_length is None:
            frequency /= scaling.factor
        else:
            length, low, high = scaling.original_length, scaling.low_frequency, scaling.high_frequency
            wavelength = 2 * np.pi / frequency
            if wavelength > length / low:
                frequency /= scaling.factor
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        angle = position * frequency
        first, second = x[0, 0, 0, [i, i + half]]
        expected = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
        np.testing.assert_allclose(found[[i, i + half]], expected, atol=1e-5)


ATTENTION = BlockConfig(mixer=AttentionConfig(heads=2), channel=GatedMLPConfig(expand=2))
MODEL = ModelConfig(width=8, layers=2, vocab_size=5, pattern=(ATTENTION,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_cap": 30.0}, "cannot say model.logit_cap = 30.0"),
        ({"norm": "layernorm"}, "a llama model has no such parameters"),
        ({"norm_position": "post"}, "cannot say model.norm_position = post"),
        (
            {"pattern": (BlockConfig(mixer=AttentionConfig(heads=2, window=3), channel=ATTENTION.channel),)},
            "cannot say model.pattern.0.mixer.window = 3",
        ),
        ({"pattern": (BlockConfig(mixer=MambaConfig()),)}, "LlamaForCausalLM has attention and a channel mixer"),
    ],
)
def test_a_model_that_a_format_cannot_say_is_refused(fields, message, tmp_path):
    model = dataclasses.replace(MODEL, **fields)
    with pytest.raises(UserError, match=message):
        write_folder(tmp_path / "out", named("llama"), model, {})
    assert not (tmp_path / "out").exists()


def test_the_format_that_fits():
    assert fitting(MODEL).name == "llama"
    window = AttentionConfig(heads=2, window=3)
    block = BlockConfig(mixer=window, channel=ATTENTION.channel)
    assert fitting(dataclasses.replace(MODEL, pattern=(block,))).name == "mistral"
    assert fitting(dataclasses.replace(MODEL, pattern=(BlockConfig(mixer=MambaConfig()),))).name == "mamba"
    learned = BlockConfig(
        mixer=AttentionConfig(heads=2, positions="none", qkv_bias=True, out_bias=True), channel=MLPConfig(bias=True)
    )
    gpt2 = dataclasses.replace(MODEL, pattern=(learned,), learned_positions=16, norm="layernorm")
    assert fitting(gpt2).name == "gpt2"
    with pytest.raises(UserError, match="none of the formats llama, "):
        fitting(dataclasses.replace(MODEL, logit_cap=1.5))


def test_a_table_that_forgets_a_parameter_is_a_bug():
    entries = list(named("llama").entries(MODEL))
    with pytest.raises(ValueError, match=r"no entry for .*periods\.blocks\.0\.mixer\.q\.weight', 1"):
        checkpoint_shapes(MODEL, [entry for entry in entries if entry.ours != ("blocks.1.mixer.q.weight",)])
