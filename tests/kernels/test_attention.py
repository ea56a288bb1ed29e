"""Attention by blocks and by the library, against numpy in float64."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.attention import Tokens, attention
from phyla.kernels.attention import xla as blocks

B, T, H = 2, 37, 6


def expected(q, k, v, began_q, began_k, index_q, index_k, causal, window, stride, everywhere, slopes):
    """One query at a time."""
    y = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        distance = index_q[t] - index_k
        sees = (index_k >= 0) & (began_k[b] == began_q[b, t])
        sees &= (distance >= 0) if causal else True
        near = np.abs(distance) < (window or 1000)
        near |= False if stride is None else distance % stride == 0
        near |= index_k - began_k[b] < everywhere
        near |= not causal and index_q[t] - began_q[b, t] < everywhere
        sees &= near
        logits = k[b, sees, n // group] @ q[b, t, n] / np.sqrt(H) - slopes[n] * np.abs(distance[sees])
        p = np.exp(logits - logits.max())
        y[b, t, n] = p @ v[b, sees, n // group] / p.sum()
    return y


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that there are several, the last one short."""
    monkeypatch.setattr(blocks, "BLOCK", 8)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("causal", "window", "sparse", "alibi"),
    [
        (True, None, (None, 0), False),
        (True, 5, (None, 0), True),
        (False, 4, (None, 0), False),
        (False, None, (None, 0), True),
        (True, 4, (5, 0), False),
        (True, 3, (None, 2), True),
        (False, 3, (7, 2), False),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_against_numpy(implementation, cached, causal, window, sparse, alibi, packed):
    rng = np.random.default_rng(0)
    N, K, S = 4, 2, T + 11 if cached else T
    q, (k, v) = rng.normal(size=(B, T, N, H)), rng.normal(size=(2, B, S, K, H))
    index_k = np.arange(S) if not cached else np.where(np.arange(S) < T + 7, np.arange(S), -1)
    index_q = np.arange(T) + (7 if cached else 0)
    began_k = np.where(np.arange(S) < 20, 0, 20) * packed * np.ones((B, 1), int)
    began_q = began_k[:, index_q]
    slopes = np.asarray([0.5, 0.1, 0.02, 0.3]) * alibi
    wanted = expected(q, k, v, began_q, began_k, index_q, index_k, causal, window, sparse[0], sparse[1], slopes)
    keys = Tokens(jnp.asarray(index_k), jnp.asarray(began_k) if packed or cached else None)
    queries = Tokens(jnp.asarray(index_q), jnp.asarray(began_q)) if cached else keys

    @functools.partial(jax.jit, static_argnums=1)
    def run(inputs, implementation):
        bias = jnp.asarray(slopes, jnp.float32) if alibi else None
        fields = {"causal": causal, "window": window, "stride": sparse[0], "everywhere": sparse[1], "slopes": bias}
        q, k, v = inputs
        return attention(q, k, v, queries, keys, **fields, implementation=implementation)

    half = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(run(half, implementation), wanted, atol=2e-6)
    if implementation == "xla":
        weights = jnp.asarray(rng.normal(size=wanted.shape), jnp.float32)
        gradients = [
            jax.jit(jax.grad(lambda x, name=name: jnp.sum(run(x, name) * weights)))(half)
            for name in ("reference", "xla")
        ]
        for a, b in zip(*gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_is_accumulated_in_float32():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, 4, H)), jnp.bfloat16) for _ in range(3))
    tokens = Tokens(jnp.arange(T), None)
    y = attention(q, k, v, tokens, tokens, implementation="xla")
    index, began = np.arange(T), np.zeros((B, T))
    a, b, c = (np.asarray(x, float) for x in (q, k, v))
    exact = expected(a, b, c, began, began, index, index, True, None, None, 0, np.zeros(4))
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, float) - exact).max() < 0.02


def test_keys_that_no_query_sees_are_not_computed():
    tokens = Tokens(jnp.arange(T), None)
    q = jnp.ones((1, T, 1, H))
    text = str(jax.make_jaxpr(lambda q: attention(q, q, q, tokens, tokens, window=5, implementation="xla"))(q))
    assert "8,12]" in text.replace("f32[1,1,1,", "")  # a block's 8 queries with 4 keys before them
    assert f"{T},{T}]" not in text


@pytest.mark.parametrize("sparse", [{}, {"stride": 16}, {"everywhere": 4}, {"stride": 16, "everywhere": 4}])
def test_no_array_has_all_queries_and_all_keys(sparse):
    """Neither in the product nor in its gradient, with a block far smaller than the sequence."""
    T = 100
    q, k, v = (jax.ShapeDtypeStruct((1, T, 2, H), jnp.float32) for _ in range(3))
    tokens = Tokens(jnp.arange(T), jnp.zeros((1, T), jnp.int32))

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, tokens, tokens, window=8, **sparse, implementation="xla"))

    written = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v))
    found = [shape.split(",") for shape in re.findall(r"\[([\d,]+)\]", written)]
    assert not [shape for shape in found if shape.count(str(T)) > 1]
    assert any(shape[-2:] == ["4", "100"] for shape in found) == bool(sparse)  # the last block, all keys
