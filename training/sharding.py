"""Where arrays live: a mesh from the configuration, and one table from logical axes to mesh axes."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phyla.models.errors import UserError
from phyla.training.config import MeshConfig

RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "inner": "tensor",
}
"""Logical axis of a parameter -> mesh axis. Axes not listed are replicated."""

BATCH = PartitionSpec(("data", "fsdp"))
"""Of everything whose first dimension is the batch."""


def make_mesh(config: MeshConfig, batch: int) -> Mesh:
    """The mesh (data, fsdp, tensor) over this job's devices, for microbatches of `batch` sequences.

    Raises UserError if the devices or the batch do not fit it.
    """
    devices = jax.devices()
    model = config.fsdp * config.tensor
    data = config.data if config.data > 0 else max(1, len(devices) // model)
    need = data * model
    shape = f"mesh data × fsdp × tensor = {data} × {config.fsdp} × {config.tensor} = {need}"
    if need > len(devices):
        fits = f"mesh.data {len(devices) // model}" if model <= len(devices) else f"mesh.tensor {len(devices)}"
        raise UserError(f"{shape} devices, but there are {len(devices)}; nearest: {fits}")
    if need < len(devices) and jax.process_count() > 1:
        raise UserError(f"{shape} devices, but a job of several processes must use all {len(devices)}")
    if batch % (data * config.fsdp):
        fits = [n for n in range(1, data + 1) if batch % (n * config.fsdp) == 0]
        raise UserError(
            f"mesh.data × mesh.fsdp = {data * config.fsdp} does not divide a microbatch of {batch} sequences; "
            f"nearest: mesh.data {max(fits, default=1)}"
        )
    grid = np.array(devices[:need]).reshape(data, config.fsdp, config.tensor)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is divided. A dimension that its mesh axis does not divide is replicated.

    Raises ValueError if two of its axes ask for the same mesh axis.
    """
    names = [RULES.get(axis) for axis in axes]
    used = [name for name in names if name is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to the same mesh axis: {names}")
    fits = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, shape, strict=True)]
    return PartitionSpec(*fits)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a tree, by the axes that its variables carry; replicated where there are none.

    Works on parameters and on what optimizers make of them: moments have a parameter's shape and share its sharding,
    other statistics are replicated.
    """

    def one(node: Any) -> Any:
        if isinstance(node, nnx.Variable):
            axes = node.get_metadata()["axes"]
            return jax.tree.map(
                lambda x: NamedSharding(mesh, spec(x.shape, axes, mesh) if len(axes) == x.ndim else PartitionSpec()),
                node,
            )
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def replicated_dimensions(tree: Any, mesh: Mesh) -> int:
    """Number of parameters with a dimension that should be divided and, for its size, is not."""
    variables = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    wanted = ((v.shape, v.get_metadata()["axes"]) for v in variables)
    return sum(
        any(a in RULES and size % mesh.shape[RULES[a]] for a, size in zip(axes, shape, strict=True))
        for shape, axes in wanted
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch, on its devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def abstract_batch(count: int, rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `put_batch` will make of a batch of `count` such rows."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.ShapeDtypeStruct((count, *value.shape[1:]), value.dtype, sharding=sharding)
        for name, value in rows.items()
    }
