"""The mixers against float64 transcriptions of their papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.mixers.attention import Attention, AttentionConfig, alibi_slopes
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.weights import materialize

B, T, D = 2, 9, 12


def build(config: LayerConfig, width: int = D):
    """The mixer, its parameters in float64 (none at zero or one), and an input."""
    model = ModelConfig(width=width, layers=2, vocab_size=7, pattern=(BlockConfig(mixer=config),))
    mixer = config.build(model, nnx.Rngs(0), 0)
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)
    x = rng.standard_normal((B, T, width)).astype(np.float32)
    weights = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(params)}
    return nnx.merge(graphdef, params), weights, x


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(config: AttentionConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """One query at a time."""
    x = x.astype(np.float64)
    N, K = config.heads, config.kv_heads or config.heads
    H = w["q.weight"].shape[1] // N
    q, k, v = (x @ w[f"{name}.weight"] + w.get(f"{name}.bias", 0) for name in "qkv")
    q, k, v = q.reshape(B, T, N, H), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
    if config.qk_norm:
        q, k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}_norm.scale"]
            for name, a in (("q", q), ("k", k))
        )
    if config.positions == "rope":

        def rotate(a):
            # As complex numbers: pair (i, i + H/2) turns by position · base^(-2i/H).
            z = a[..., : H // 2] + 1j * a[..., H // 2 :]
            z = z * np.exp(1j * np.arange(T)[:, None, None] * config.rope_base ** (-2 * np.arange(H // 2) / H))
            return np.concatenate([z.real, z.imag], -1)

        q, k = rotate(q), rotate(k)
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for t in range(T):
            for n in range(N):
                near = [
                    s
                    for s in range(T)
                    if (s <= t or not config.causal)
                    and (
                        config.window is None
                        or abs(t - s) < config.window
                        or (config.stride is not None and (t - s) % config.stride == 0)
                        or s < config.global_tokens
                        or (not config.causal and t < config.global_tokens)
                    )
                ]
                score = np.array([q[b, t, n] @ k[b, s, n * K // N] for s in near]) / np.sqrt(H)
                if config.positions == "alibi":
                    score -= 2.0 ** (-8 * (n + 1) / N) * np.abs(t - np.array(near))
                out[b, t, n] = softmax(score) @ v[b, near, n * K // N]
    return out.reshape(B, T, N * H) @ w["o.weight"] + w.get("o.bias", 0)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(heads=2),
        AttentionConfig(heads=4, kv_heads=2, head_dim=6, rope_base=50.0, qk_norm=True),
        AttentionConfig(heads=4, kv_heads=1, positions="none", qkv_bias=True, out_bias=True),
        AttentionConfig(heads=4, positions="alibi"),
        AttentionConfig(heads=2, window=3),
        AttentionConfig(heads=2, positions="alibi", causal=False),
        AttentionConfig(heads=2, window=2, causal=False),
        AttentionConfig(heads=2, window=2, stride=3),
        AttentionConfig(heads=2, positions="alibi", window=2, global_tokens=2, causal=False),
        AttentionConfig(heads=2, window=2, stride=4, global_tokens=1),
    ],
    ids=lambda config: (
        f"{config.positions}-{config.heads}-{config.kv_heads}-{config.window}-{config.stride}-{config.global_tokens}"
        f"-{config.causal}"
    ),
)
def test_attention_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], attention(config, weights, x), atol=2e-5)


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    # Twelve heads: those of eight, then every second one of sixteen (the authors' code).
    extra = [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), [*(2.0 ** -np.arange(1, 9)), *extra], rtol=1e-6)


def mamba(config: MambaConfig, w: dict, x: np.ndarray) -> np.ndarray:
    """One token at a time, from the equations of the paper (section 3, algorithm 2)."""
    x = x.astype(np.float64)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    inner, N = w["D"].shape[0], config.state
    xz = x @ w["in_proj.weight"] + w.get("in_proj.bias", 0)
    u, z = xz[..., :inner], xz[..., inner:]
    out = np.zeros((B, T, w["out_proj.weight"].shape[1]))
    for b in range(B):
        h = np.zeros((inner, N))
        for t in range(T):
            taps = [w["conv_weight"][-1 - i] * u[b, t - i] for i in range(min(config.conv, t + 1))]
            c = silu(sum(taps) + w.get("conv_bias", 0))
            proj = c @ w["x_proj.weight"]
            rank = proj.shape[0] - 2 * N
            low, B_t, C_t = proj[:rank], proj[rank : rank + N], proj[rank + N :]
            dt = np.log1p(np.exp(low @ w["dt_proj.weight"] + w["dt_bias"]))
            A = -np.exp(w["A_log"])
            h = np.exp(dt[:, None] * A) * h + (dt * c)[:, None] * B_t
            y = h @ C_t + w["D"] * c
            out[b, t] = (y * silu(z[b, t])) @ w["out_proj.weight"] + w.get("out_proj.bias", 0)
    return out


@pytest.mark.parametrize(
    "config", [MambaConfig(), MambaConfig(state=3, conv=2, expand=1.5, dt_rank=5, bias=True, conv_bias=False)]
)
def test_mamba_equals_its_definition(config):
    mixer, weights, x = build(config)
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], mamba(config, weights, x), atol=2e-5)


def test_mamba_begins_as_published():
    width = 256
    model = ModelConfig(width=width, layers=4, vocab_size=7, pattern=(BlockConfig(mixer=MambaConfig()),))
    mixer = MambaConfig().build(model, nnx.Rngs(0), 0)
    np.testing.assert_allclose(np.exp(mixer.A_log[...]), np.tile(np.arange(1, 17), (2 * width, 1)), rtol=1e-6)
    assert (mixer.D[...] == 1).all()
    dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
    assert 0.9e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.11
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.1  # log-uniform on [1e-3, 0.1]
    bound = 16**-0.5
    dt_proj, out_proj = (np.asarray(materialize(layer.weight)) for layer in (mixer.dt_proj, mixer.out_proj))
    assert dt_proj.shape == (16, 2 * width)
    assert 0.99 * bound < np.abs(dt_proj).max() <= bound
    np.testing.assert_allclose(np.std(out_proj), (2 * width) ** -0.5 / 2, rtol=0.02)


def test_bidirectional_attention_has_no_cache():
    mixer, _, x = build(AttentionConfig(heads=2, causal=False))
    with pytest.raises(UserError, match="bidirectional"):
        mixer(jnp.asarray(x), mixer.initial_state(B, T))


def test_a_windows_cache_is_as_short_as_the_window():
    full, windowed = (build(AttentionConfig(heads=2, window=window))[0].initial_state(1, 100) for window in (None, 7))
    assert full.k.shape[2] == 100
    assert windowed.k.shape[2] == 7


def test_what_sparse_attention_sees_is_told_by_document():
    """`Attention.seen`, of the second document of a row: its window, every fourth before, its first token."""
    mixer, _, x = build(AttentionConfig(heads=2, window=2, stride=4, global_tokens=1))
    assert isinstance(mixer, Attention)
    seen = mixer.seen(jnp.asarray(x), jnp.ones((B, T), jnp.int32).at[1, 1:].set(2))[1]
    right = [
        [s >= 1 and (0 <= t - s < 2 or (t >= s and (t - s) % 4 == 0) or s == 1) for s in range(T)] for t in range(T)
    ]
    np.testing.assert_array_equal(seen[1:], np.array(right)[1:] & (np.arange(T) <= np.arange(1, T)[:, None]))


def test_sparse_attention_decodes_as_it_reads():
    """In chunks and one by one, of packed documents too: what is far back is still in the cache."""
    mixer, _, x = build(AttentionConfig(heads=2, window=2, stride=4, global_tokens=1))
    segments = jnp.ones((B, T), jnp.int32).at[1, 3:].set(2)
    call = nnx.jit(lambda mixer, *arguments: mixer(*arguments))
    whole = call(mixer, jnp.asarray(x), None, segments)[0]
    state, found = mixer.initial_state(B, T), []
    for first, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        y, state = call(mixer, jnp.asarray(x[:, first:end]), state, segments[:, first:end])
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-5)
    alone = call(mixer, jnp.asarray(x[:, 3:]), None, None)[0]
    np.testing.assert_allclose(whole[1, 3:], alone[1], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(stride=2), r"attention\.stride and attention\.global_tokens need attention\.window"),
        (AttentionConfig(window=3, stride=0), r"attention\.stride must be at least 1, not 0"),
        (AttentionConfig(window=3, global_tokens=-1), r"attention\.global_tokens must be at least 0, not -1"),
        (AttentionConfig(heads=5), r"attention\.heads 5 does not divide model\.width 12; nearest: (4|6)"),
        (AttentionConfig(heads=4, kv_heads=3), r"attention\.kv_heads 3 does not divide attention\.heads 4; nearest: "),
        (AttentionConfig(heads=4), r"attention\.head_dim must be positive, and even for RoPE, not 3"),
        (AttentionConfig(window=0), r"attention\.window must be at least 1, not 0"),
        (MambaConfig(state=0), r"mamba\.state must be at least 1, not 0"),
        (MambaConfig(expand=0.0), r"mamba\.expand must give at least one"),
    ],
)
def test_impossible_values_name_the_field(config, message):
    with pytest.raises(UserError, match=message):
        build(config)


def test_mambas_step_size_and_state_are_float32_whatever_the_dtype():
    """Without input the state only decays, by exp(dt A) a token, with dt the softplus of its bias."""
    config = MambaConfig(state=3, conv_bias=False)
    model = ModelConfig(width=D, layers=1, vocab_size=7, pattern=(BlockConfig(mixer=config),), dtype="bfloat16")
    mixer = config.build(model, nnx.Rngs(0), 0)
    before = mixer.initial_state(1, T)
    _, after = mixer(jnp.zeros((1, T, D), jnp.bfloat16), before._replace(scan=jnp.ones_like(before.scan)))
    dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
    expected = np.exp(-T * dt[:, None] * np.exp(np.asarray(mixer.A_log[...], np.float64)))
    assert after is not None
    assert after.scan.dtype == jnp.float32
    np.testing.assert_allclose(after.scan[0], expected, rtol=1e-5)
