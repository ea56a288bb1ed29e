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
    not in a tuple. Without a mesh, on one device, or inside `shard_map` over all axes, it is a plain call.
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
        free = set(mesh.axis_names) - set(mesh.manual_axes)
        if not free or mesh.size == 1:
            return run(*arrays)
        divided = {}
        for dim, names in AXES.items():
            over = tuple(name for name in names if name in free)
            parts = math.prod(mesh.shape[name] for name in over)
            if over and dim in sizes and all(size % parts == 0 for size in sizes[dim]):
                divided[dim] = over

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
        # Over all axes, divided or not: Mosaic's kernels cannot be inside anything that is left to the partitioner.
        return jax.shard_map(local, in_specs=in_specs, out_specs=one_or_all, axis_names=free)(*present)

    return call
