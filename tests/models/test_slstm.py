"""The sLSTM layer against its definition, and how it begins."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.mlp import GatedMLPConfig

B, T, D = 2, 9, 12


def build(config: LayerConfig):
    """The layer, its parameters in float64 (none at zero or one), and an input."""
    model = ModelConfig(width=D, layers=2, vocab_size=7, pattern=(BlockConfig(mixer=config),))
    mixer = config.build(model, nnx.Rngs(0), 1)
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), params)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    return nnx.merge(graphdef, params), weights, x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slstm(config: SLSTMConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """Cell by cell, from equations 8 to 14 of the paper without a stabiliser: the numbers here are small."""
    x = x.astype(np.float64)
    H, P = config.heads, D // config.heads
    out = np.zeros((B, T, D))
    for b in range(B):
        c, n, h = np.zeros((H, P)), np.zeros((H, P)), np.zeros((H, P))
        for t in range(T):
            u = x[b, t]
            if config.conv:
                taps = [w["conv_weight"][-1 - k] * x[b, t - k] for k in range(min(config.conv, t + 1))]
                u = sum(taps) + w["conv_bias"]
                u = u * sigmoid(u)
            for j in range(H):
                inputs = {"i": u, "f": u, "z": x[b, t], "o": x[b, t]}
                i, f, z, o = (
                    inputs[name][j * P : (j + 1) * P] @ w[f"{name}.weight"][j]
                    + h[j] @ w["recurrent"][g, j]
                    + w["bias"][g, j]
                    for g, name in enumerate("ifzo")
                )
                c[j] = sigmoid(f) * c[j] + np.exp(i) * np.tanh(z)
                n[j] = sigmoid(f) * n[j] + np.exp(i)
                h[j] = sigmoid(o) * c[j] / n[j]
                out[b, t, j * P : (j + 1) * P] = (h[j] - h[j].mean()) / np.sqrt(h[j].var() + 1e-5)
    return out * w["norm.scale"]


@pytest.mark.parametrize("config", [SLSTMConfig(), SLSTMConfig(heads=3, conv=2), SLSTMConfig(heads=1, conv=0)])
def test_slstm_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], slstm(config, weights, x), atol=2e-5)


def test_every_block_begins_as_published():
    """Forget biases are a power law of the cell, whose power grows with depth; the model is built under vmap."""
    block = BlockConfig(mixer=SLSTMConfig(heads=2), channel=GatedMLPConfig(expand=1.3, activation="gelu", round_to=64))
    width, L = 128, 3
    model = LanguageModel(ModelConfig(width=width, layers=L, vocab_size=7, pattern=(block,)), nnx.Rngs(0))
    mixer: Any = model.periods.blocks[0].mixer
    P = width // 2
    for layer in range(L):
        power = 0.3 + 1.3 * layer / (L - 1)
        forget = np.array([5 - 12 * (k / (P - 1)) ** power for k in range(P)])
        np.testing.assert_allclose(mixer.bias[layer, 1], np.tile(forget, (2, 1)), rtol=1e-5, atol=1e-5)
    assert not mixer.bias[:, [0, 2, 3]].any()
    assert not mixer.recurrent[...].any()
    for gate in (mixer.i, mixer.f, mixer.z, mixer.o):
        assert gate.weight.shape == (L, 2, P, P)
        np.testing.assert_allclose(np.std(gate.weight[...]), np.sqrt(2 / 5 / width), rtol=0.02)
    channel: Any = model.periods.blocks[0].channel
    assert channel.up.weight.shape == (L, width, 192)  # 1.3 · 128 = 166.4


def test_a_single_block_has_the_power_law_of_a_first_one():
    config = ModelConfig(width=8, layers=1, vocab_size=7, pattern=(BlockConfig(mixer=SLSTMConfig(heads=8)),))
    mixer: Any = LanguageModel(config, nnx.Rngs(0)).periods.blocks[0].mixer
    np.testing.assert_allclose(mixer.bias[0, 1], 5)  # and heads of one cell have its first value


def test_the_cell_is_float32_whatever_the_dtype():
    """With its forget gates open the cell sums 400 tokens; bfloat16 would stop at 256."""
    config = SLSTMConfig(heads=2, conv=0)
    model = ModelConfig(width=4, layers=1, vocab_size=7, pattern=(BlockConfig(mixer=config),), dtype="bfloat16")
    mixer = config.build(model, nnx.Rngs(0), 0)
    mixer.bias.set_value(jnp.zeros_like(mixer.bias[...]).at[1].set(50.0))
    _, state = mixer(jnp.zeros((1, 400, 4), jnp.bfloat16), mixer.initial_state(1, 400))
    assert state is not None
    np.testing.assert_allclose(state.cell[1], 400)
    assert {leaf.dtype for leaf in state.cell} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SLSTMConfig(heads=5), r"slstm\.heads 5 does not divide model\.width 12; nearest: (4|6)"),
        (SLSTMConfig(heads=0), r"slstm\.heads must be at least 1, not 0"),
        (SLSTMConfig(conv=-1), r"slstm\.conv must be at least 0, not -1"),
        (GatedMLPConfig(round_to=0), r"gated_mlp\.round_to must be at least 1, not 0"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)
