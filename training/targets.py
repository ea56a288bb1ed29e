"""Chips that programs can be compiled for, present or not."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


class Chip(NamedTuple):
    """Published figures of one device: a chip, or the half of one where JAX sees two (tpu7x)."""

    topology: str  # the smallest that the compiler knows
    cores: int  # that share the work of a device
    clock: float  # Hz of the TensorCore; of tpu7x it is not published, and taken from the matrix units' figure
    bandwidth: float  # bytes per second of HBM
    flops: float  # bfloat16 operations per second of the matrix units
    int8: float  # int8 operations per second of the matrix units
    float8: float  # float8 operations per second of the matrix units; elsewhere they are done in bfloat16

    @property
    def vector(self) -> float:
        """float32 operations per second of the vector units: four a cycle, each on 8 × 128 numbers."""
        return 4 * self.transcendental

    @property
    def transcendental(self) -> float:
        """Exponentials and their like per second: one unit of 8 × 128."""
        return self.cores * 8 * 128 * self.clock


CHIPS = {
    "v5e": Chip("v5e:2x2", 1, 1.5e9, 819e9, 197e12, 394e12, 197e12),
    "v5p": Chip("v5p:2x2x1", 2, 1.75e9, 2765e9, 459e12, 918e12, 459e12),
    "v6e": Chip("v6e:2x2", 1, 1.75e9, 1640e9, 918e12, 1836e12, 918e12),
    "tpu7x": Chip("tpu7x:2x2x1", 1, 2.2e9, 3690e9, 1153.5e12, 1153.5e12, 2307e12),
}

KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
"""What JAX calls them."""


def mesh(target: str, devices: int = 1) -> Mesh:
    """The first devices of a chip's topology as a mesh (data,), for `jax.jit(f).lower(...).compile()`.

    Needs libtpu, and JAX on another platform (JAX_PLATFORMS=cpu). Several processes may compile at once.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[target].topology)
    return Mesh(np.array(topology.devices[:devices]), ("data",), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Around compilations for chips that are not here, whose programs the persistent cache can write but not read."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
