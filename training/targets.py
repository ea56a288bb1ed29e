"""Chips that programs can be compiled for, present or not."""

import os
from typing import NamedTuple

import numpy as np
from jax.sharding import AxisType, Mesh


class Chip(NamedTuple):
    """Published figures of one chip (of one core, where a chip has two)."""

    topology: str  # the smallest that the compiler knows
    clock: float  # Hz of the TensorCore
    bandwidth: float  # bytes per second of HBM
    flops: float  # bfloat16 operations per second of the matrix units
    int8: float  # int8 operations per second of the matrix units


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 819e9, 197e12, 394e12),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2765e9, 459e12, 918e12),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9, 918e12, 1836e12),
    "tpu7x": Chip("tpu7x:2x2x1", 1.9e9, 7380e9, 2307e12, 4614e12),
}


def mesh(target: str, devices: int = 1) -> Mesh:
    """The first devices of a chip's topology as a mesh (data,), for `jax.jit(f).lower(...).compile()`.

    Needs libtpu, and JAX on another platform (JAX_PLATFORMS=cpu).
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[target].topology)
    return Mesh(np.array(topology.devices[:devices]), ("data",), axis_types=(AxisType.Auto,))
