"""Selective scan: what is particular to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.dispatch import Unfit
from phyla.kernels.selective_scan import selective_scan, tpu_layout
from phyla.kernels.selective_scan.xla import _exp2, _exp2_cpu
from phyla.training import targets
from tests.kernels.chip import temporaries


def gradient(*arguments):
    def loss(*arguments):
        y, state = selective_scan(*arguments, implementation="xla")
        return jnp.sum(y**2) + jnp.sum(state**2)

    return jax.grad(loss, argnums=range(6))(*arguments)


def shapes(B, T, D, N):
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(B, T, D)] * 2 + [(D, N)] + [(B, T, N)] * 2 + [(D,)]]


def test_memory_does_not_grow_with_the_states():
    B, T, D = 2, 1024, 64
    temporary = {}
    for N in (16, 64):
        compiled = jax.jit(gradient).lower(*shapes(B, T, D, N)).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        temporary[N] = analysis.temp_size_in_bytes
        assert temporary[N] < B * T * D * N * 4
    assert temporary[64] < 2 * temporary[16]


def test_memory_of_a_training_step_with_the_kernel():
    """Beside arguments and gradients: the states before chunks, B, C and theirs with lanes to spare, y and its own."""
    T, D, N = 2**17, 1024, 16  # so many tokens that nothing stays on the chip
    x, dt = (jax.ShapeDtypeStruct((1, T, D), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    A, skip = jax.ShapeDtypeStruct((D, N), jnp.float32), jax.ShapeDtypeStruct((D,), jnp.float32)
    B = jax.ShapeDtypeStruct((1, T, N), jnp.bfloat16)

    def loss(*arguments):
        return jnp.sum(selective_scan(*arguments)[0].astype(jnp.float32) ** 2)

    used = temporaries(jax.grad(loss, argnums=range(6)), x, dt, A, B, B, skip)
    chunk, _ = tpu_layout.DEFAULT
    assert used / T < 4 * N * D / chunk + 2048 + 2 * 2 * D


def test_states_that_do_not_fit_run_elsewhere():
    """Asked for by name, the kernel raises; chosen for its chip, it steps aside and says why."""
    arguments = shapes(1, 256, 4096, 1024)
    with pytest.raises(Unfit, match=r"1024 states of 4096 channels need .* of 48 MB VMEM"):
        jax.eval_shape(functools.partial(selective_scan, implementation="tpu"), *arguments)
    with jax.set_mesh(targets.mesh("v5e")), pytest.warns(UserWarning, match="no tpu kernel fits, so xla runs"):
        jax.eval_shape(selective_scan, *arguments)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_finite_at_the_edges_of_the_range(implementation):
    """dt A from 0 to beyond the largest float32."""
    x, B, C = (jnp.ones((1, 40, n)) for n in (4, 3, 3))
    dt = jnp.tile(jnp.asarray([0.0, 1e-38, 1.0, 1e9]), (1, 40, 1))
    A = jnp.tile(jnp.asarray([0.0, -1.0, -1e30]), (4, 1))

    def call(x, dt, A, B, C, D):
        return selective_scan(x, dt, A, B, C, D, implementation=implementation)

    outputs, vjp = jax.vjp(call, x, dt, A, B, C, jnp.ones(4))
    for value in jax.tree.leaves((outputs, vjp(jax.tree.map(jnp.ones_like, outputs)))):
        assert np.all(np.isfinite(value))


def test_exp2_to_float32_precision():
    z = -np.concatenate([np.linspace(0, 126, 100_001), np.geomspace(1e-30, 1, 10_001)]).astype(np.float32)
    exact = 2.0 ** z.astype(float)
    np.testing.assert_allclose(jax.jit(_exp2_cpu)(z), exact, rtol=2.0**-23)
    assert _exp2_cpu(jnp.zeros(())) == 1
    assert 0 < _exp2_cpu(jnp.asarray(-jnp.inf)) <= 2.0**-126
    assert np.isnan(_exp2_cpu(jnp.asarray(jnp.nan)))
    np.testing.assert_allclose(jax.grad(_exp2)(-1.5), np.log(2) * 2**-1.5, rtol=1e-6)


def test_xla_refuses_float64():
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"'xla' computes in float32.*use 'reference'"):
        selective_scan(*(jnp.zeros(s.shape, float) for s in shapes(1, 2, 3, 4)), implementation="xla")
