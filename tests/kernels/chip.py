"""Programs compiled for a chip that is not here."""

from collections.abc import Callable
from typing import Any

import jax

from phyla.training import targets


def temporaries(function: Callable[..., Any], *arguments: Any, target: str = "v5e") -> int:
    """Bytes that a function compiled for one chip needs beside arguments and results (ShapeDtypeStructs, or trees)."""
    mesh = targets.mesh(target)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arguments)
    # What is compiled without the chip can be written to the persistent cache, but not read from it.
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        with jax.set_mesh(mesh):
            analysis = jax.jit(function).lower(*placed).compile().memory_analysis()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    assert analysis is not None
    return analysis.temp_size_in_bytes
