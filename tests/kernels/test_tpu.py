"""The interpreter of TPU kernels finds what the suite of the ops relies on it to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.tpu import pallas_call

BLOCK = (8, 128)


@pytest.fixture(autouse=True)
def interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def copy(x, *, wait: bool):
    """`x`, by a DMA from HBM that the kernel waits for, or not."""

    def kernel(x_ref, y_ref, scratch, semaphore):
        dma = pltpu.make_async_copy(x_ref, scratch, semaphore)
        dma.start()
        if wait:
            dma.wait()
        y_ref[...] = scratch[...]
        if not wait:
            dma.wait()

    return pallas_call(
        kernel,
        jax.ShapeDtypeStruct(BLOCK, jnp.float32),
        x,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(BLOCK, jnp.float32), pltpu.SemaphoreType.DMA],
    )


def test_a_race_is_an_error():
    x = jnp.ones(BLOCK)
    np.testing.assert_array_equal(copy(x, wait=True), x)
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(copy(x, wait=False))


def test_what_nobody_wrote_is_nan():
    def kernel(x_ref, y_ref, scratch):
        y_ref[...] = x_ref[...] + scratch[...]

    call = pallas_call(
        kernel,
        jax.ShapeDtypeStruct(BLOCK, jnp.float32),
        jnp.ones(BLOCK),
        scratch_shapes=[pltpu.VMEM(BLOCK, jnp.float32)],
    )
    assert np.all(np.isnan(call))


def test_a_read_out_of_bounds_is_an_error():
    def kernel(at_ref, x_ref, y_ref):
        y_ref[...] = x_ref[pl.ds(at_ref[0], 8)]

    def call(at):
        return pallas_call(
            kernel,
            jax.ShapeDtypeStruct(BLOCK, jnp.float32),
            jnp.asarray([at]),
            jnp.ones((16, 128)),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()],
        )

    assert np.all(call(8) == 1)
    with pytest.raises(Exception, match=r"[Oo]ut-of-bounds"):
        jax.block_until_ready(call(12))
