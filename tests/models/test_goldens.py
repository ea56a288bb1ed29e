"""Logits that other implementations computed, where their files lie beside the repository (skipped elsewhere)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens"


def llama(config, w, i):
    """A layer of Llama or Mistral."""
    layer = f"model.layers.{i}."
    parts = {"mixer.q": "self_attn.q_proj", "mixer.k": "self_attn.k_proj", "mixer.v": "self_attn.v_proj"}
    parts |= {"mixer.o": "self_attn.o_proj", "channel.up": "mlp.up_proj", "channel.down": "mlp.down_proj"}
    parts |= {"channel.gate": "mlp.gate_proj"}
    matrices = {f"{ours}.weight": w[f"{layer}{theirs}.weight"].T for ours, theirs in parts.items()}
    norms = {"mixer_norm": "input_layernorm", "channel_norm": "post_attention_layernorm"}
    return matrices | {f"{ours}.scale": w[f"{layer}{theirs}.weight"] for ours, theirs in norms.items()}


def llama_model(config, w):
    mixer = AttentionConfig(
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        window=config.get("sliding_window"),
        rope_base=config["rope_parameters"]["rope_theta"],
    )
    channel = GatedMLPConfig(expand=config["intermediate_size"] / config["hidden_size"])
    whole = {"embedding.weight": w["model.embed_tokens.weight"], "norm.scale": w["model.norm.weight"]}
    whole["head.weight"] = w["lm_head.weight"].T
    model = ModelConfig(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        tie_embeddings=False,
        norm_epsilon=config["rms_norm_eps"],
        pattern=(BlockConfig(mixer=mixer, channel=channel),),
    )
    return model, whole, llama


def gpt2(config, w, i):
    """A layer of GPT-2, whose matrices are (in, out) already."""
    layer, d = f"transformer.h.{i}.", config["n_embd"]
    found = {}
    for j, name in enumerate("qkv"):
        found[f"mixer.{name}.weight"] = w[f"{layer}attn.c_attn.weight"][:, j * d : (j + 1) * d]
        found[f"mixer.{name}.bias"] = w[f"{layer}attn.c_attn.bias"][j * d : (j + 1) * d]
    for ours, theirs in {"mixer.o": "attn.c_proj", "channel.up": "mlp.c_fc", "channel.down": "mlp.c_proj"}.items():
        found |= {f"{ours}.{part}": w[f"{layer}{theirs}.{part}"] for part in ("weight", "bias")}
    for ours, theirs in {"mixer_norm": "ln_1", "channel_norm": "ln_2"}.items():
        found |= {f"{ours}.scale": w[f"{layer}{theirs}.weight"], f"{ours}.bias": w[f"{layer}{theirs}.bias"]}
    return found


def gpt2_model(config, w):
    mixer = AttentionConfig(heads=config["n_head"], positions="none", qkv_bias=True, out_bias=True)
    whole = {"embedding.weight": w["transformer.wte.weight"], "position_embedding.weight": w["transformer.wpe.weight"]}
    whole |= {"norm.scale": w["transformer.ln_f.weight"], "norm.bias": w["transformer.ln_f.bias"]}
    model = ModelConfig(
        width=config["n_embd"],
        layers=config["n_layer"],
        vocab_size=config["vocab_size"],
        learned_positions=config["n_positions"],
        norm="layernorm",
        norm_epsilon=config["layer_norm_epsilon"],
        pattern=(BlockConfig(mixer=mixer, channel=MLPConfig(activation="gelu_tanh", bias=True)),),
    )
    return model, whole, gpt2


def mamba(config, w, i):
    """A layer of Mamba-1."""
    layer = f"backbone.layers.{i}."
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    found = {f"mixer.{name}.weight": w[f"{layer}mixer.{name}.weight"].T for name in names}
    found |= {f"mixer.{name}": w[f"{layer}mixer.{name}"] for name in ("A_log", "D")}
    found["mixer.dt_bias"] = w[f"{layer}mixer.dt_proj.bias"]
    found["mixer.conv_weight"] = w[f"{layer}mixer.conv1d.weight"][:, 0].T
    found["mixer.conv_bias"] = w[f"{layer}mixer.conv1d.bias"]
    return found | {"mixer_norm.scale": w[f"{layer}norm.weight"]}


def mamba_model(config, w):
    whole = {"embedding.weight": w["backbone.embeddings.weight"], "norm.scale": w["backbone.norm_f.weight"]}
    mixer = MambaConfig(state=config["state_size"], conv=config["conv_kernel"], dt_rank=config["time_step_rank"])
    model = ModelConfig(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        norm_epsilon=config["layer_norm_epsilon"],
        pattern=(BlockConfig(mixer=mixer),),
    )
    return model, whole, mamba


FAMILIES = {"llama": llama_model, "mistral": llama_model, "gpt2": gpt2_model, "mamba": mamba_model}


@pytest.fixture(params=FAMILIES)
def golden(request):
    """A model with the other implementation's weights, and what that implementation computed."""
    folder = GOLDENS / request.param
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    model, whole, layer = FAMILIES[request.param](config, weights)
    layers = [layer(config, weights, i) for i in range(model.layers)]
    stacked = {f"periods.blocks.0.{name}": np.stack([part[name] for part in layers]) for name in layers[0]}
    graphdef, params = nnx.split(sizes.abstract(model))
    values = whole | stacked
    for path, parameter in nnx.to_flat_state(params):
        value = values.pop(".".join(map(str, path)))
        assert value.shape == parameter.shape, path
        parameter.set_value(jnp.asarray(value))
    assert not values
    return nnx.merge(graphdef, params), load_file(folder / "io.safetensors")


@jax.jit
def logits(model, tokens, state=None):
    hidden, state = model(tokens, state)
    return model.logits(hidden), state


def test_logits_equal_the_other_implementations(golden):
    model, io = golden
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    np.testing.assert_allclose(logits(model, tokens)[0], io["logits"], atol=2e-4)
    first, state = logits(model, tokens[:, :20], model.initial_state(2, 33))
    second, _ = logits(model, tokens[:, 20:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), io["logits"], atol=2e-4)


def test_the_greedy_continuation_equals_the_other_implementations(golden):
    model, io = golden
    out, state = logits(model, jnp.asarray(io["input_ids"][:1, :9], jnp.int32), model.initial_state(1, 40))
    expected, drawn = io["generated"][0, 9:].tolist(), []  # it begins with the prompt
    while len(drawn) < len(expected):
        drawn.append(int(out[0, -1].argmax()))
        out, state = logits(model, jnp.asarray([drawn[-1:]], jnp.int32), state)
    assert drawn == expected
