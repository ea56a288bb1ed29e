"""A kernel is opaque to the partitioner: each device runs it on its own rows of the batch and its own channels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

AXES = {"B": ("data", "fsdp"), "H": ("tensor",)}
"""Dimension -> the mesh axes that divide it. B is the batch; H is heads or channels, whatever is independent."""


def per_device(run: Callable[..., Any], arguments: Sequence[str], results: Sequence[str]) -> Callable[..., Any]:
    """`run`, called by every device of the mesh in the context with its own part of every array.

    `arguments` and `results` name the dimensions of each array, for example "B T H P"; those in `AXES` are divided
    where the mesh axes divide every size, the others are whole on every device. An argument may be None; one result is
    not in a tuple. Without a mesh, or inside `shard_map` over all of its axes, it is a plain call.
    """

    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return run(*arrays)
        sizes: dict[str, list[int]] = {}
        for array, dims in zip(arrays, arguments, strict=True):
            if array is not None:
                for dim, size in zip(dims.split(), array.shape, strict=True):
                    sizes.setdefault(dim, []).append(size)
        divided = {}
        for dim, names in AXES.items():
            free = tuple(n for n in names if n in mesh.axis_names and n not in mesh.manual_axes and mesh.shape[n] > 1)
            parts = math.prod(mesh.shape[n] for n in free)
            if free and dim in sizes and all(size % parts == 0 for size in sizes[dim]):
                divided[dim] = free
        manual = {axis for axes in divided.values() for axis in axes}
        if not manual:
            return run(*arrays)

        def spec(dims: str) -> PartitionSpec:
            return PartitionSpec(*(divided.get(dim) for dim in dims.split()))

        given = [array is not None for array in arrays]

        def local(*present):
            rest = iter(present)
            return run(*(next(rest) if here else None for here in given))

        in_specs = tuple(spec(dims) for dims, here in zip(arguments, given, strict=True) if here)
        out_specs = [spec(dims) for dims in results]
        present = [array for array in arrays if array is not None]
        one_or_all = tuple(out_specs) if len(out_specs) > 1 else out_specs[0]
        return jax.shard_map(local, in_specs=in_specs, out_specs=one_or_all, axis_names=manual)(*present)

    return call
