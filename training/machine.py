"""What this machine can do and is doing: its matmul peak, its memory, its name."""

import functools
import math
import os
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIZE = 2048
STREAM = 2**28
"""Of a matrix product, and bytes of an array that is read."""


@functools.cache
def matmul_peak(mesh: Mesh, dtype: str) -> float:
    """Floating-point operations per second of square matrix products on all of a mesh's devices at once.

    The best of three runs: interruptions only make it slower.
    """
    devices = math.prod(mesh.shape.values())
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    a = jax.jit(lambda: jnp.ones((devices, SIZE, SIZE), dtype), out_shardings=sharding)()
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * devices * SIZE**3 / best


@functools.cache
def memory_bandwidth(mesh: Mesh) -> float:
    """Bytes per second that a sum over an array far beyond any cache reads, on all of a mesh's devices at once.

    The best of five runs: interruptions only make it slower.
    """
    devices = math.prod(mesh.shape.values())
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    a = jax.jit(lambda: jnp.ones((devices, STREAM // 4), jnp.float32), out_shardings=sharding)()
    total = jax.jit(lambda a: a.sum(1))
    total(a).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        total(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return a.nbytes / best


def memory_in_use() -> int:
    """Bytes: of the first device where it counts them, else of this process (resident)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_in_use"]
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes per device that a compiled program needs at once: arguments, results and temporaries."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + kept + stats.temp_size_in_bytes


def description(mesh: Mesh) -> str:
    """Such as `cpu (2 devices)`."""
    device = jax.devices()[0]
    n = math.prod(mesh.shape.values())
    return f"{device.device_kind} ({n} device{'s' if n > 1 else ''})"
