"""What the TPU kernels share: one way to call Pallas, and one table of block sizes a chip."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import platform

LANES, SUBLANES = 128, 8
"""Of a float32 vector register; bfloat16 has 16 rows of 128, int8 has 32."""

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
"""Of kernels where there is no TPU. To look for races takes time that grows with the square of a kernel's accesses."""


def kind() -> str:
    """Such as "TPU v5 lite": the chip that is traced for; "" where it is not a TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "tpu" else ""
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""


def pallas_call(kernel: Callable[..., None], out_shape: Any, *arguments: jax.Array, **options: Any) -> Any:
    """`pl.pallas_call(kernel, out_shape, **options)(*arguments)`, compiled where the platform is a TPU.

    Elsewhere the kernel is interpreted, slowly, with a detector of races and NaN in uninitialised memory. The results
    vary over the same mesh axes as the arguments inside `jax.shard_map` (which `arguments.align` made alike).
    """
    varying = jax.typeof(arguments[0]).manual_axis_type
    results = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=varying), out_shape)
    if platform() == "tpu":
        return pl.pallas_call(kernel, results, **options)(*arguments)
    # One after another under vmap: the interpreter does not know of the dimension that this adds to the grid.
    return sequential_vmap(pl.pallas_call(kernel, results, interpret=INTERPRETER, **options))(*arguments)
