"""Mixing matrices: what attention and the linear recurrences do with values, written out as one matrix a head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.kernels.mlstm import mlstm
from phyla.kernels.wkv6 import wkv6
from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.mixers.attention import Attention, AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6Config
from phyla.models.mixers.rwkv7 import RWKV7Config
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.token_shift import shift

B, T, D = 2, 7, 16
SEGMENTS = jnp.asarray([[1] * T, [1, 1, 1, 2, 2, 2, 0]])
SAME = np.asarray(SEGMENTS)[:, :, None] == np.asarray(SEGMENTS)[:, None]
BEFORE = np.tril(np.ones((T, T), bool))

CONFIGS: dict[str, Any] = {
    "attention": AttentionConfig(heads=4, kv_heads=2, qk_norm=True),
    "alibi-window": AttentionConfig(heads=2, positions="alibi", window=3),
    "mamba2": Mamba2Config(head_dim=8, state=6, groups=2),
    "mamba3": Mamba3Config(head_dim=8, state=6, groups=2),
    "mlstm": MLSTMConfig(heads=2, input_bias=2.0),
    "mlstm-sigmoid": MLSTMConfig(heads=2, gate="sigmoid", input_bias=0.0),
    "mlstm-block": MLSTMBlockConfig(heads=2, input_bias=2.0),
    "rwkv6": RWKV6Config(head_dim=8, mix_rank=3, decay_rank=4),
    "rwkv7": RWKV7Config(head_dim=8, decay_rank=3, rate_rank=4, value_residual=False, gate_rank=6),
}


@functools.cache
def made(name: str) -> tuple[Any, jax.Array, np.ndarray]:
    """A mixer with every parameter stirred, so that no gate is closed; an input; its matrices."""
    config: LayerConfig = CONFIGS[name]
    model = ModelConfig(width=D, layers=1, pattern=(BlockConfig(mixer=config),), vocab_size=5)

    def build() -> Any:
        mixer = config.build(model, nnx.Rngs(0), 0)
        for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(mixer, nnx.Param))):
            noise = jax.random.normal(jax.random.key(i), variable.shape)
            variable.set_value(variable[...] + 0.2 * noise)
        return mixer

    graphdef = nnx.split(nnx.eval_shape(build))[0]
    x = jax.random.normal(jax.random.key(7), (B, T, D))

    def both() -> tuple[nnx.State, jax.Array]:
        mixer = build()
        return nnx.split(mixer)[1], mixer.mixing(x, SEGMENTS)

    state, matrices = jax.jit(both)()
    assert matrices.shape == (B, config.mixing_heads(model), T, T)
    return nnx.merge(graphdef, state), x, np.asarray(matrices, np.float64)


def given_of(mixer: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """What the op of a mixer is given."""

    def of(mixer: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        match type(mixer).__name__:
            case "MLSTM":
                return mixer._given(x)
            case "RWKV7":
                return mixer._given(x, shift(x, None, SEGMENTS)[0])
            case _:
                return mixer._given(x, None, SEGMENTS)

    return jax.jit(of)(mixer, x)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_mixed_with_those_before_them_in_their_document(name):
    _, _, matrices = made(name)
    seen = SAME[:, None] & BEFORE
    assert (matrices[~np.broadcast_to(seen, matrices.shape)] == 0).all()
    assert (np.abs(matrices[:, :, np.arange(T), np.arange(T)]) > 1e-4).all()
    if name.startswith("alibi"):
        assert (matrices[0][:, 3, 0] == 0).all()
    else:
        assert (np.abs(matrices[0][:, 3, 0]) > 1e-6).all()


@pytest.mark.parametrize("name", ["attention", "alibi-window"])
def test_attentions_matrix_is_what_it_does(name):
    """Through the values and the output projection it is the layer."""
    mixer, x, matrices = made(name)
    assert isinstance(mixer, Attention)
    np.testing.assert_allclose(matrices.sum(-1), 1, rtol=1e-6)
    values, whole = jax.jit(lambda mixer, x: (mixer.projected(x, SEGMENTS)[2], mixer(x, None, SEGMENTS)[0]))(mixer, x)
    y = np.einsum("bnts,bsnh->btnh", matrices, np.asarray(values, np.float64)).reshape(B, T, -1)
    output: Any = mixer.o.weight
    y = y @ np.asarray(output[...], np.float64)
    np.testing.assert_allclose(whole, y, rtol=1e-4, atol=1e-5)


def test_mamba_2s_matrix_in_float64():
    """C_t·B_s exp(Σ dt A) dt_s, and D (Dao and Gu 2024, equation 16)."""
    mixer, x, matrices = made("mamba2")
    _, dt, A, B_, C, D_ = (np.asarray(part, np.float64) for part in given_of(mixer, x)[:6])
    B_, C = (np.repeat(part, len(A) // part.shape[2], axis=2) for part in (B_, C))
    sums = np.cumsum(dt * A, axis=1)
    decay = np.exp(np.minimum(sums[:, :, None] - sums[:, None], 0))
    expected = np.einsum("bthn,bshn,btsh,bsh->bhts", C, B_, decay, dt) * (SAME & BEFORE)[:, None]
    expected += np.eye(T) * D_[:, None, None]
    np.testing.assert_allclose(matrices, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlstm", "mlstm-block"])
def test_mlstms_matrix_in_float64(name):
    """The decay matrix times q·k / √K over its normaliser (Beck et al. 2024, equation 27)."""
    mixer, x, matrices = made(name)
    given = given_of(mixer, x)
    q, k, i, f = (np.asarray(given[j], np.float64) for j in ((0, 1, 2, 3) if name == "mlstm" else (0, 1, 3, 4)))
    sums = np.cumsum(-np.logaddexp(0, -f), axis=1)
    log_decay = sums[:, :, None] - sums[:, None] + i[:, None]
    scores = np.einsum("bthk,bshk->btsh", q, k) / np.sqrt(q.shape[-1])
    weights = np.where((SAME & BEFORE)[..., None], np.exp(np.minimum(log_decay, 80)), 0) * scores
    expected = weights / np.maximum(np.abs(weights.sum(2, keepdims=True)), 1)
    np.testing.assert_allclose(matrices, np.moveaxis(expected, 3, 1), rtol=1e-4, atol=1e-5)


def test_rwkv_7s_matrix_in_float64():
    """r_t against what is left of k_s after each token since has decayed, erased and added."""
    mixer, x, matrices = made("rwkv7")
    r, log_w, k, a, b = (np.asarray(part, np.float64) for part in given_of(mixer, x))
    expected = np.zeros_like(matrices)
    for row, head, s in np.ndindex(B, r.shape[2], T):
        left = k[row, s, head]
        for t in range(s, T):
            if not SAME[row, s, t]:
                break
            if t > s:
                w = np.exp(log_w[row, t, head])
                left = left * w + (left @ a[row, t, head]) * b[row, t, head]
            expected[row, head, t, s] = left @ r[row, t, head]
    np.testing.assert_allclose(matrices, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba3", "rwkv6", "mlstm-sigmoid"])
def test_values_go_through_the_matrix(name):
    """What the layer's own op made of its own values is the matrix times them."""
    mixer, x, matrices = made(name)

    @jax.jit
    def own(mixer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if name == "mamba3":
            _, v, *given = mixer._split(x)
            values = v.reshape(B, T, mixer.heads, -1)
            return values, mixer._scanned(x, values, given, mixer.initial_state(B, T), SEGMENTS)[0]
        if name == "rwkv6":
            r, w, k, values, _ = mixer._given(x, shift(x, None, SEGMENTS)[0])
            return values, wkv6(r, w, k, values, mixer._first(), segment_ids=SEGMENTS)[0]
        q, k, *gates = mixer._given(x)
        values = mixer.v(x).reshape(B, T, 2, -1)
        return values, mlstm(q, k, values, *gates, segment_ids=SEGMENTS, gate="sigmoid")[0]

    values, y = own(mixer, x)
    expected = np.einsum("bhts,bshv->bthv", matrices, np.asarray(values, np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_who_has_none():
    """Channels of their own decays (Mamba-1, RWKV-4), and a recurrence that is not linear (sLSTM)."""
    model = ModelConfig(width=D, layers=1, pattern=(BlockConfig(mixer=MambaConfig()),), vocab_size=5)
    assert all(config.mixing_heads(model) is None for config in (MambaConfig(), RWKV4Config(), SLSTMConfig()))
    mixer = nnx.eval_shape(lambda: MambaConfig().build(model, nnx.Rngs(0), 0))
    with pytest.raises(TypeError, match="Mamba has no mixing matrices"):
        mixer.mixing(jnp.zeros((1, 2, D)))
