"""What the GPU kernels share: one way to call Mosaic GPU, and meshes of chips to lower for.

A kernel is a body over Refs; one instance of it is one thread block of one warpgroup (128 threads), whose arrays
are spread over the threads' registers by a layout. What the compiler and the interpreter accept (JAX 0.12):

- `ref[...]` in SMEM or GMEM, scalars too; `plgpu.load(ref.at[...], layout=, optimized=False)` where the layout is
  not one that the compiler has a fast path for (all but those of the matrix units), `plgpu.store` likewise. From
  GMEM to registers and back needs no staging; whole rows of 128 neighbours are as good as a bulk copy.
- `ROWS` gives every thread a whole row of an array [128, N]: sums over N stay in the thread, and vectors of 128
  (`ROWS.reduce(1)`) and N (`ROWS.reduce(0)`, held by all) broadcast into it for free. `TILES` has the layout of the
  matrix units, 4 rows and N/4 columns a thread: sums in both directions are a few shuffles. `jnp.sum` over rows
  goes through SMEM, and every thread has the result. Name the layout at the loads; the rest is inferred.
- A vector becomes a matrix only by `jax.lax.broadcast_in_dim` (`columns`, `rows` here): `v[:, None]` is a reshape,
  which no layout survives. No slices of registers, no dots between registers: slice Refs; `plgpu.wgmma` (Hopper),
  `plgpu.mma` (Ampere), `plgpu.tcgen05_mma` (Blackwell) multiply.
- `jax.lax.fori_loop` with registers as the carry; loops of constant length, any order of indices.
- `plgpu.emit_pipeline` (`pipeline` here) stages the inputs of the next step in SMEM while this one runs: TMA on
  Hopper and Blackwell, cp.async on Ampere. Its outputs (`out_specs`) neither run in the interpreter nor lower for
  Ampere: store to GMEM. Reads of a block end with `plgpu.commit_smem`, or the next copy is a race. The minor side of
  a block is a multiple of 16 bytes, and so are all strides of its array; for cp.async a block has a multiple of 128
  elements, 4 bytes or more a thread.
- A scalar of a Ref is no operand of `jnp.where` beside an array: `jnp.broadcast_to` first.
- What a thread wrote to SMEM, the others of its block may read: the compiler adds the barriers.
- The interpreter calls back into Python for every access of a Ref, some 0.1 ms each: loads belong in long vectors.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from phyla.kernels.dispatch import platform

THREADS = 128
"""Of a warpgroup; also the rows of `ROWS` and `TILES`."""
ROWS = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
TILES = plgpu.Layout.TCGEN05
CHIPS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108, "8.0"),
    "h100": ("NVIDIA H100 80GB HBM3", 132, "9.0"),
    "b200": ("NVIDIA B200", 148, "10.0"),
}
"""Name -> what the driver calls it, its multiprocessors, its compute capability."""


def kernel(body: Callable[..., None], out_type: Any, *arguments: jax.Array, **options: Any) -> Any:
    """`plgpu.kernel(body, out_type=out_type, **options)(*arguments)`, compiled where the platform is a GPU.

    Elsewhere the kernel is interpreted, slowly, with a detector of races and NaN in uninitialised memory. The results
    vary over the same mesh axes as the arguments inside `jax.shard_map` (which `arguments.align` made alike).
    """
    alone = not jax.sharding.get_abstract_mesh().manual_axes  # else the interpreter mixes up the devices' clocks
    interpret = None if platform() == "gpu" else plgpu.InterpretGPUParams(detect_races=alone)
    results = plgpu.kernel(body, out_type=out_type, interpret=interpret, **options)(*arguments)
    varying = tuple(jax.typeof(arguments[0]).manual_axis_type.varying)
    return jax.tree.map(lambda v: jax.lax.pcast(v, varying, to="varying"), results) if varying else results


def capability() -> str | None:
    """Such as "9.0": the GPU that is traced for; None where it is not one, and every GPU's kernels are interpreted."""
    if platform() != "gpu":
        return None
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(jax.devices()[0] if device is None else device, "compute_capability", None)


def load(ref: Any, layout: Any) -> jax.Array:
    """What is in SMEM or GMEM, as float32 in registers."""
    v = plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
    # Inside `jax.shard_map` a Ref's numbers vary over the mesh, but arithmetic on them does not (JAX 0.12 has types
    # for neither in a kernel), so that they could not be the carry of a loop.
    return v if jax.typeof(v).manual_axis_type.empty else v * 1.0


def store(ref: Any, v: jax.Array) -> None:
    """Write registers to SMEM or GMEM in the dtype of the Ref."""
    plgpu.store(ref, v.astype(ref.dtype), optimized=False)


def pipeline(body: Callable[..., Any], specs: Sequence[Any], carry: Any, steps: int) -> Callable[..., Any]:
    """Run `carry = body(k, *blocks, carry)` for k < steps over blocks in SMEM; given the arrays' Refs, the last carry.

    The blocks of the next step arrive meanwhile.
    """

    def step(index, *blocks_and_carry):
        carry = body(index[0], *blocks_and_carry)
        plgpu.commit_smem()  # what was read may be overwritten by the next copy
        return carry

    if platform() != "gpu" and jax.sharding.get_abstract_mesh().manual_axes:
        # With several devices, the interpreter's first to finish reports the barriers of the others as its own
        # leaks: no barriers, no staging.
        def run(*refs):
            def unstaged(k, carry):
                return body(k, *(_block(spec, ref, k) for spec, ref in zip(specs, refs, strict=True)), carry)

            return jax.lax.fori_loop(0, steps, unstaged, carry)

        return run
    return plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, init_carry=carry, max_concurrent_steps=2)


def _block(spec: Any, ref: Any, k: jax.Array) -> Any:
    """The part of an array in GMEM that a pipeline would stage in step k."""
    sizes = zip(spec.index_map(k), spec.block_shape, strict=True)
    return ref.at[tuple(i if size is None else pl.ds(i * size, size) for i, size in sizes)]


def columns(v: jax.Array, width: int) -> jax.Array:
    """A vector [M] as `width` equal columns, [M, width]."""
    return jax.lax.broadcast_in_dim(v, (v.shape[0], width), (0,))


def rows(v: jax.Array, height: int) -> jax.Array:
    """A vector [N] as `height` equal rows, [height, N]."""
    return jax.lax.broadcast_in_dim(v, (height, v.shape[0]), (1,))


def reset(v: jax.Array, resets_ref: Any, *at: Any) -> jax.Array:
    """Zeros if the integer in GMEM is not 0; `v` if it is, or there are none (None)."""
    return v if resets_ref is None else jnp.where(jnp.broadcast_to(resets_ref[at], v.shape) != 0, 0.0, v)


def pad(v: jax.Array, *multiples: int) -> jax.Array:
    """Zeros at the end: axis, multiple, axis, multiple, ..."""
    widths = [(0, 0)] * v.ndim
    for axis, multiple in zip(multiples[::2], multiples[1::2], strict=True):
        widths[axis] = (0, -v.shape[axis] % multiple)
    return jnp.pad(v, widths)


@dataclasses.dataclass(frozen=True)
class _Device(AbstractDevice):
    """Says for which architecture Mosaic GPU lowers, as a present device does."""

    compute_capability: str = "9.0"


def lowering_mesh(chip: str) -> AbstractMesh:
    """A mesh of one absent GPU ("a100", "h100" or "b200"), to lower for it on any machine:

    with jax.sharding.use_abstract_mesh(lowering_mesh("h100")):
        jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))
    """
    kind, cores, capability = CHIPS[chip]
    device = _Device(device_kind=kind, num_cores=cores, platform="cuda", compute_capability=capability)
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
