"""Grouped matmul against float64, in every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from phyla.kernels.grouped_matmul import grouped_matmul
from phyla.kernels.grouped_matmul.xla import STEP, TILE

IMPLEMENTATIONS = ("reference", "xla", "ragged")
SIZES = {
    "a row each": [1, 1, 1],
    "empty groups": [0, 7, 0, 0, 4, 0],
    "steps and one more": [STEP, STEP + 1, 0, 2 * STEP - 1],
    "tiles and one more": [TILE, 3, TILE + STEP + 1, 1],
    "all in the last": [0, 0, 2 * TILE + 5],
}


def expected(x, weight, sizes, g):
    """y, dx, dw in float64, one group at a time."""
    x, weight, g = (np.asarray(a, np.float64) for a in (x, weight, g))
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(weight)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ weight[e], g[rows] @ weight[e].T, x[rows].T @ g[rows]
        start += size
    return y, dx, dw


def inputs(sizes, surplus, dtype="float32"):
    rng, N = np.random.default_rng(0), sum(sizes) + surplus
    shapes = (N, 5), (len(sizes), 5, 3), (N, 3)
    x, weight, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x.astype(dtype), weight, g.astype(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("surplus", [0, 9])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients(implementation, sizes, surplus):
    x, weight, g = inputs(sizes, surplus)

    @jax.jit
    def run(x, weight, sizes, g):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, weight)
        return y, *pullback(g)

    found = run(x, weight, jnp.asarray(sizes), g)
    for a, b in zip(found, expected(x, weight, sizes, g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_accumulated_in_float32(implementation):
    sizes = [200, 0, 40]
    x, weight, g = inputs(sizes, 3, "bfloat16")
    x, g = x + 4, g + 4  # sums far larger than bfloat16's steps
    y, pullback = jax.vjp(
        lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation), x, weight
    )
    dx, dw = pullback(g)
    assert (y.dtype, dx.dtype, dw.dtype) == ("bfloat16", "bfloat16", "float32")
    exact = expected(x, weight.astype("bfloat16"), sizes, g)
    np.testing.assert_allclose(dw, exact[2], rtol=1e-5, atol=1e-3)
    for a, b in zip((y, dx), exact[:2], strict=True):
        np.testing.assert_allclose(a.astype(float), b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_after_the_last_group_change_nothing(implementation):
    sizes = [3, 30]
    x, weight, g = inputs(sizes, 4)

    def run(x, g):
        y, pullback = jax.vjp(
            lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation), x, weight
        )
        return y, *pullback(g)

    jax.tree.map(np.testing.assert_array_equal, run(x.at[33:].set(1e3), g.at[33:].set(-1e3)), run(x, g))


def test_float64_in_the_reference():
    with jax.enable_x64(True):
        sizes = [2, 5]
        x, weight, g = (np.asarray(a, np.float64) for a in inputs(sizes, 1))
        y = grouped_matmul(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(sizes), implementation="reference")
        np.testing.assert_allclose(y, expected(x, weight, sizes, g)[0], rtol=1e-14)


@pytest.mark.parametrize("implementation", ["xla", "ragged"])
def test_vmap_and_scan(implementation):
    sizes = jnp.asarray([[3, 4, 33], [40, 0, 0]])
    x, weight, _ = inputs([40], 0)[0], *inputs([3, 4, 33], 0)[1:]
    both = jnp.stack([x, 2 * x])
    call = lambda x, sizes: grouped_matmul(x, weight, sizes, implementation=implementation)  # noqa: E731
    alone = jnp.stack([call(*pair) for pair in zip(both, sizes, strict=True)])
    np.testing.assert_allclose(jax.vmap(call)(both, sizes), alone, atol=1e-6)
    scanned = jax.lax.scan(lambda carry, pair: (carry, call(*pair)), None, (both, sizes))[1]
    np.testing.assert_allclose(scanned, alone, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "ragged"])
def test_shard_map_sums_the_gradient_of_a_replicated_weight(implementation):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sizes = [[3, 4, 33], [40, 0, 0]]
    x, weight, g = inputs([80], 0)[0], *inputs([3, 4, 73], 0)[1:]

    def call(x, weight, sizes):
        return grouped_matmul(x, weight, sizes[0], implementation=implementation)

    sharded = jax.shard_map(call, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
    y, pullback = jax.vjp(lambda x, w: sharded(x, w, jnp.asarray(sizes)), x, weight)
    dx, dw = pullback(g)
    halves = [expected(x[i : i + 40], weight, sizes[i // 40], g[i : i + 40]) for i in (0, 40)]
    np.testing.assert_allclose(y, np.concatenate([halves[0][0], halves[1][0]]), atol=1e-5)
    np.testing.assert_allclose(dx, np.concatenate([halves[0][1], halves[1][1]]), atol=1e-5)
    np.testing.assert_allclose(dw, halves[0][2] + halves[1][2], atol=1e-5)


def test_bad_arguments_are_named():
    x, weight, _ = inputs([3, 4], 0)
    with pytest.raises(ValueError, match=r"grouped_matmul: weight has shape \(2, 5, 3\), expected"):
        grouped_matmul(x[:, :4], weight, jnp.asarray([3, 4]))
    with pytest.raises(ValueError, match=r"grouped_matmul: sizes is int32 \(3,\), expected integers \[E=2\]"):
        grouped_matmul(x, weight, jnp.asarray([3, 4, 0]))
    with pytest.raises(ValueError, match="did you mean 'ragged'"):
        grouped_matmul(x, weight, jnp.asarray([3, 4]), implementation="raged")
