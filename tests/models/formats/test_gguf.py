"""GGUF files written here from a fixture: biases, a tied head, one key head for each query head."""

from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from phyla.models.errors import UserError
from phyla.models.formats import open_source
from phyla.models.formats.source import build, load
from phyla.models.mixers.attention import AttentionConfig, RopeScaling

GOLDEN = Path(__file__).parents[2] / "goldens" / "llama-tied"
HEAD_DIM = 16
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def tensors():
    """The fixture's tensors by GGUF's names; rows i and i + H/2 of the rotated projections become neighbours."""
    order = np.arange(HEAD_DIM).reshape(2, -1).T.ravel()
    found = {}
    for name, array in load_file(GOLDEN / "model.safetensors").items():
        stem, kind = name.rsplit(".", 1)
        if stem in WHOLE:
            found[f"{WHOLE[stem]}.{kind}"] = array
            continue
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            array = np.ascontiguousarray(array.reshape(-1, HEAD_DIM, *array.shape[1:])[:, order].reshape(array.shape))
        found[f"blk.{layer}.{PARTS[part]}.{kind}"] = array
    return found


def write(path, arrays, *, kind=None, architecture="llama", fields=None, strings=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(56)
    writer.add_head_count(2)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, value in (fields or {}).items():
        writer.add_float32(name, value)
    for name, value in (strings or {}).items():
        writer.add_string(name, value)
    for name, array in arrays.items():
        if kind is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_other_implementation_s_logits(tmp_path):
    source = open_source(write(tmp_path / "a.gguf", tensors()))
    assert source.vocabulary is None
    model = nnx.merge(*build(source))
    io = load_file(GOLDEN / "io.safetensors")
    found = model.logits(model(jnp.asarray(io["input_ids"], jnp.int32))[0])
    np.testing.assert_allclose(found, io["logits"], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("kind", "levels"), [("F16", 2**10), ("BF16", 2**7), ("Q8_0", 127), ("Q5_1", 15), ("Q4_1", 7)])
def test_quantized_tensors_become_float32(kind, levels, tmp_path):
    exact = load(open_source(write(tmp_path / "exact.gguf", tensors())))
    found = load(open_source(write(tmp_path / "a.gguf", tensors(), kind=gguf.GGMLQuantizationType[kind])))
    for path, lazy in found.items():
        array, expected = lazy.read(), exact[path].read()
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=0, atol=np.abs(expected).max() / levels)
    assert (found["embedding.weight"].read() != exact["embedding.weight"].read()).any()


def test_rope(tmp_path):
    fields = {"llama.rope.freq_base": 500.0, "llama.rope.scaling.factor": 4.0}
    strings = {"llama.rope.scaling.type": "linear"}
    mixer = open_source(write(tmp_path / "a.gguf", tensors(), fields=fields, strings=strings)).model.pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    assert (mixer.rope_base, mixer.rope_scaling) == (500.0, RopeScaling(factor=4.0))


def test_rope_of_llama_3(tmp_path):
    """A divisor for each frequency, by the published rule: 8 times slower beyond 8192 tokens a turn, not below 2048."""
    wavelengths = 2 * np.pi * 500_000.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    smooth = (8192 / wavelengths - 1) / 3
    divisors = np.where(smooth < 0, 8, np.where(smooth > 1, 1, 1 / ((1 - smooth) / 8 + smooth))).astype(np.float32)
    fields = {"llama.rope.freq_base": 500_000.0}
    arrays = tensors() | {"rope_freqs.weight": divisors}
    source = open_source(write(tmp_path / "a.gguf", arrays, fields=fields))
    mixer = source.model.pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    assert mixer.rope_scaling == RopeScaling(factor=8.0, original_length=8192)
    source.check()
    arrays["rope_freqs.weight"] = divisors[::-1].copy()
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        open_source(write(tmp_path / "b.gguf", arrays, fields=fields))


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.gguf"

    def fails(message, *, arrays=None, **changes):
        write(path, arrays or tensors(), **changes)
        with pytest.raises(UserError, match=message) as caught:
            load(open_source(path))
        assert str(path) in str(caught.value)

    fails("general.architecture is 'qwen2'; supported: 'llama'", architecture="qwen2")
    fails(r"unknown flag llama\.attention\.logit_cap = 30\.0", fields={"llama.attention.logit_cap": 30.0})
    fails(r"llama\.rope\.scaling\.type is 'yarn'", strings={"llama.rope.scaling.type": "yarn"})
    fails(r"no place for the tensor blk\.0\.extra\.weight", arrays=tensors() | {"blk.0.extra.weight": np.ones(2, "f4")})
    less = tensors()
    del less["blk.1.ffn_up.weight"]
    fails(r"no tensor blk\.1\.ffn_up\.weight \[56, 32\]", arrays=less)
    path.write_bytes(b"nonsense" * 10)
    with pytest.raises(UserError, match="is not a GGUF file"):
        open_source(path)
