"""What every op does with its arguments before it dispatches."""

import jax
import jax.numpy as jnp


def check(op: str, **arguments: tuple[jax.Array | None, str]) -> None:
    """Check the arguments of `op`, each given as (array, dimensions), for example `A=(A, "D N")`.

    A name stands for one size (at least 1) wherever it appears and takes it from the first argument that has it;
    an integer stands for itself. Arguments that are None are skipped. `segment_ids` must have an integer dtype,
    all others a floating one.

    Raises:
        ValueError: naming the op, the argument, what it is and what it should be.
    """
    sizes: dict[str, int] = {}
    for name, (array, spec) in arguments.items():
        if array is None:
            continue
        dims = spec.split()
        known = {dim: int(dim) for dim in dims if dim.isdigit()} | sizes
        if array.ndim != len(dims) or any(
            size != known.get(dim, max(size, 1)) for dim, size in zip(dims, array.shape, strict=True)
        ):
            expected = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
            raise ValueError(f"{op}: {name} has shape {array.shape}, expected [{expected}] with sizes >= 1")
        kind = jnp.integer if name == "segment_ids" else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}, expected a dtype that is {kind.__name__}")
        sizes = known | dict(zip(dims, array.shape, strict=True))


def align(*arrays: jax.Array) -> list[jax.Array]:
    """Make all arrays vary over the same mesh axes inside `jax.shard_map`; elsewhere, return them as they are.

    The carry of a scan and the cotangents of a custom VJP must vary over the mesh like the values that they are
    computed from: without this, a replicated weight beside a sharded input is a type error. Adding zeros that
    vary is the cast that JAX's own arithmetic inserts, and its transpose sums the weight's gradient over the mesh.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return list(arrays)
    zero = sum(jnp.zeros_like(array, shape=(), dtype=jnp.int8) for array in arrays)
    return [array + jnp.astype(zero, array.dtype) for array in arrays]
