"""Chips that programs can be compiled for, present or not."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from phyla.kernels import gpu


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


class Gpu(NamedTuple):
    """Published figures of one GPU, as `Chip`, and what its compiler must know."""

    capability: tuple[int, int]
    cores: int  # multiprocessors
    clock: float  # Hz, boosted
    memory: int  # bytes
    cache: int  # bytes of L2
    shared: int  # bytes of shared memory of a multiprocessor; a block may have 1 KB less
    bandwidth: float
    flops: float
    int8: float
    float8: float

    @property
    def vector(self) -> float:
        """float32 operations per second: 128 lanes of a multiprocessor."""
        return 128 * self.cores * self.clock

    @property
    def transcendental(self) -> float:
        """Exponentials and their like per second: 16 of a multiprocessor."""
        return 16 * self.cores * self.clock

    def description(self, kind: str) -> str:
        """What XLA asks of the device, a GpuTargetConfigProto as text."""
        major, minor = self.capability
        device = {
            "name": kind,
            "device_vendor": "NVIDIA Corporation",
            "platform_version": f"Compute Capability {major}.{minor}a",
            "core_count": self.cores,
            "fpus_per_core": 128,
            "clock_rate_ghz": self.clock / 1e9,
            "device_memory_size": self.memory,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.cache,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
            "shared_memory_per_block": 48 * 1024,
            "threads_per_warp": 32,
            "threads_per_block_limit": 1024,
            "threads_per_core_limit": 2048,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "device_address_bits": 64,
            **dict.fromkeys(("driver_version", "runtime_version", "compile_time_toolkit_version"), "13.0.0"),
            "dnn_version": "9.10.0",
        }
        fields = [f"{name}: {json.dumps(value)}" for name, value in device.items()]
        return f"""
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: {json.dumps(kind)}
            gpu_device_info {{
                cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
                {" ".join(fields)}
            }}
        """


GPUS = {"h100": Gpu((9, 0), 132, 1.98e9, 80 * 2**30, 50 * 2**20, 228 * 2**10, 3350e9, 989e12, 1979e12, 1979e12)}

KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
"""What JAX calls them."""


def mesh(target: str, devices: int = 1) -> Mesh:
    """The first devices of a chip's topology as a mesh (data,), for `jax.jit(f).lower(...).compile()`.

    Needs libtpu, or for one of `GPUS` jax[cuda13], and JAX on another platform (JAX_PLATFORMS=cpu). Several processes
    may compile at once.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    if target in GPUS:
        config = GPUS[target].description(gpu.CHIPS[target][0])
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target, topology=f"1x1x{devices}", target_config=config
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[target].topology)
    return Mesh(np.array(topology.devices[:devices]), ("data",), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Around compilations for chips that are not here, whose programs the persistent cache can write but not read.

    JAX asks once whether there is a cache, at the first compilation: it must ask again, inside and afterwards.
    """
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
