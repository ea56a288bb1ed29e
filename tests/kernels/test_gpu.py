"""Kernels for GPUs lower for chips that are not here; their interpreter finds what the suite of the ops relies on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from phyla.kernels import gpu
from phyla.kernels.dispatch import Unfit
from phyla.kernels.selective_scan import selective_scan

B, T, WIDTH = 1, 8192, 5120


class Problem(NamedTuple):
    """An op at a realistic size: its arguments' shapes, in the activations' dtype (True) or in float32."""

    call: Callable
    arguments: dict[str, tuple[tuple[int, ...], bool]]
    kernels: int = 2  # in a forward and backward pass

    def lower(self, chip: str, dtype) -> str:
        """The program of a forward and backward pass."""
        shapes = {k: jax.ShapeDtypeStruct(s, dtype if low else jnp.float32) for k, (s, low) in self.arguments.items()}
        ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

        def loss(arguments, segment_ids):
            results = self.call(**arguments, segment_ids=segment_ids, implementation="gpu")
            return sum(jnp.sum(v, dtype=jnp.float32) for v in jax.tree.leaves(results))

        with jax.sharding.use_abstract_mesh(gpu.lowering_mesh(chip)):
            traced = jax.jit(jax.value_and_grad(loss)).trace(shapes, ids)
            return traced.lower(lowering_platforms=("cuda",)).as_text()


PROBLEMS = {
    "selective_scan": Problem(
        selective_scan,
        {
            "x": ((B, T, WIDTH), True),
            "dt": ((B, T, WIDTH), True),
            "A": ((WIDTH, 16), False),
            "B": ((B, T, 16), True),
            "C": ((B, T, 16), True),
            "D": ((WIDTH,), False),
        },
    ),
}


@pytest.mark.parametrize("chip", gpu.CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_backward_lower(name, dtype, chip):
    program = PROBLEMS[name].lower(chip, dtype)
    assert program.count("custom_call @mosaic_gpu") == PROBLEMS[name].kernels


def test_what_does_not_fit_says_why():
    x, A, B = jnp.ones((1, 4, 8)), -jnp.ones((8, 33)), jnp.ones((1, 4, 33))
    with pytest.raises(Unfit, match="N is 33"):
        selective_scan(x, x, A, B, B, jnp.ones(8), implementation="gpu")


def copy(x, *, wait: bool):
    """`x`, by a bulk copy to SMEM that the kernel waits for, or not."""

    def body(x_ref, y_ref, block, barrier):
        plgpu.copy_gmem_to_smem(x_ref, block, barrier)
        if wait:
            plgpu.barrier_wait(barrier)
        y_ref[...] = block[...]
        if not wait:
            plgpu.barrier_wait(barrier)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return gpu.kernel(body, shape, x, scratch_types=(plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()))


def test_a_race_is_an_error():
    x = jnp.ones((128, 16))
    np.testing.assert_array_equal(copy(x, wait=True), x)
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(copy(x, wait=False))


def test_what_nobody_wrote_is_nan():
    def body(x_ref, y_ref, block):
        y_ref[...] = x_ref[...] + block[...]

    x = jnp.ones((128, 16))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = gpu.kernel(body, shape, x, scratch_types=(plgpu.SMEM(x.shape, x.dtype),))
    assert np.all(np.isnan(call))
