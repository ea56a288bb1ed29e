"""State-space duality for TPUs: a chunk of tokens and a block of heads at a time, the state on the chip.

The mathematics is that of the XLA implementation. Of one chunk, C Bᵀ is computed once for all heads of a block, and
C h and the update of h are products as wide as all its heads; what each head has of its own is the [Q, Q] matrix of
decays. Heads narrower than a register's 128 lanes stand side by side in a tile of 128.

In memory, beside inputs and results, for the backward pass: the state before every chunk in the dtype of x, that is
H P N / Q elements a token, and dt and the log decay with time as the last dimension, 8 H bytes a token.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels import tpu
from phyla.kernels.arguments import align
from phyla.kernels.dispatch import Unfit
from phyla.kernels.partition import per_device
from phyla.kernels.ssd.tpu_backward import backward
from phyla.kernels.ssd.tpu_chunk import (
    BLOCK,
    VMEM,
    Decays,
    Sizes,
    Spread,
    arguments,
    between,
    dot,
    fade,
    inward,
    side_by_side,
    triangle,
)
from phyla.kernels.ssd.xla import ssd_xla

LARGE = 3e38  # finite in bfloat16 too
CHUNK = 128  # the size of the matrix unit, for which the products of a token are the fewest
HEADS = 32  # a block at most; C Bᵀ is computed once for all of them


def ssd_tpu(x, dt, log_decay, B, C, D, initial_state, resets, *, chunk=CHUNK, heads=HEADS):
    """Run the kernel in float32, with products in the dtype of x. `resets` is bool [B, T] or None.

    One token is decoded by XLA: reading the state is all of its time. `chunk` is in tokens, a multiple of 128 on the
    chip itself; `heads` is the most that one block has.
    """
    if initial_state.dtype != jnp.float32:
        raise ValueError("ssd: 'tpu' computes in float32, but x is float64; cast it or use 'reference'")
    batch, T, H, P = x.shape
    if T == 1:
        return ssd_xla(x, dt, log_decay, B, C, D, initial_state, resets)
    sizes = Sizes.of(H, P, B.shape[2], B.shape[3], chunk, heads)
    needed = 8 * sizes.N * sizes.lanes * 4
    if needed > VMEM:
        raise Unfit(f"the state of one block of heads needs {needed >> 20} MiB on the chip, more than {VMEM >> 20}")
    if resets is not None:
        log_decay = jnp.where(resets[..., None], -jnp.inf, log_decay)
    else:
        resets = jnp.zeros((batch, T), bool)
    dtype = jnp.result_type(x, B, C)
    x_BxTxHP, B, C = x.reshape(batch, T, H * P).astype(dtype), B.astype(dtype), C.astype(dtype)
    scan = functools.partial(_scan, chunk, heads)
    y, end = scan(x_BxTxHP, dt.astype(jnp.float32), log_decay, B, C, D.astype(jnp.float32), initial_state, resets)
    return y.reshape(x.shape).astype(x.dtype), end


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(chunk, heads, *arrays) -> tuple[jax.Array, jax.Array]:
    return _divided(_forward, chunk, heads, False)(*arrays)


def _scan_forward(chunk, heads, *arrays):
    y, end, states = _divided(_forward, chunk, heads, True)(*arrays)
    return (y, end), (*arrays, states)


def _scan_backward(chunk, heads, saved, cotangents):
    return backward(chunk, heads, saved, cotangents)


_scan.defvjp(_scan_forward, _scan_backward)


def _divided(run, chunk, heads, keep):
    def call(*arrays):
        results = ("B T H", "B H P N", "B K H N") if keep else ("B T H", "B H P N")
        groups = arrays[3].shape[2]
        return per_device(functools.partial(run, chunk, heads, keep), arguments(groups), results)(*arrays)

    return call


def _forward(chunk, heads, keep, x, dt, log_decay, B, C, D, h, resets):
    del resets  # they are in the log decay
    batch, T, H = dt.shape
    s = Sizes.of(H, x.shape[2] // H, B.shape[2], B.shape[3], chunk, heads)
    D = s.pad_heads(jnp.repeat(D, s.P)[None], channels=True)
    arrays = align(*inward(s, x, dt, log_decay, B, C), D, s.state_in(h).swapaxes(2, 3))
    chunks = arrays[0].shape[1] // s.Q
    spec = s.specs(chunks, reverse=False)
    shape = jax.ShapeDtypeStruct
    results = {
        "channels": shape(arrays[0].shape, x.dtype),
        "wide state": shape(arrays[-1].shape, jnp.float32),
        "states": shape((batch, chunks, s.J * s.lanes, s.N), x.dtype),
    }
    if not keep:
        del results["states"]
    y, end, *states = tpu.pallas_call(
        functools.partial(_forward_kernel, s),
        tuple(results.values()),
        *arrays,
        grid=(batch, s.J, chunks),
        in_specs=[spec[name] for name in ("channels", "rows", "rows", "group", "group", "D", "wide state")],
        out_specs=tuple(spec[name] for name in results),
        scratch_shapes=s.scratch(),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * s.J * chunks * s.Q * (s.lanes * (s.Q + 2 * s.N) + s.Q * s.N),
            transcendentals=batch * s.J * chunks * s.R * s.Q**2,
            bytes_accessed=sum(math.prod(v.shape) * v.dtype.itemsize for v in (*arrays, *results.values())),
        ),
        name="ssd_forward",
    )
    return s.cut_heads(y[:, :T], channels=True), s.state_out(end.swapaxes(2, 3)), *states


def _forward_kernel(s, x_ref, dt_ref, decay_ref, B_ref, C_ref, D_ref, start_ref, y_ref, end_ref, *rest):
    *states_ref, far_ref, near_ref = rest
    h_ref = end_ref.at[0, 0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        end_ref[...] = start_ref[...]

    for ref in states_ref:
        # What overflowed in one document would be 0 · inf in another.
        for tile in range(s.lanes // s.tile):
            at = slice(tile * s.tile, (tile + 1) * s.tile)
            h = jnp.where(jnp.abs(h_ref[:, at]) < LARGE, h_ref[:, at], 0)
            ref[0, 0, at] = h.astype(ref.dtype).T
    dt, B, C = dt_ref[0, 0], B_ref[0, 0], C_ref[0, 0]
    from_start = dot(C, h_ref[...].astype(C.dtype))  # of all heads at once: the matrix unit works while decays are made
    decays = Decays.of(decay_ref[0, 0], far_ref, near_ref)
    # Step sizes belong to the lanes.
    far_ref[...] *= dt
    near_ref[...] *= dt
    to_end = decays.to_end * dt
    prefix = decays.prefix.T
    blocks = Spread(s, decays.blocks)
    scores = jnp.where(triangle(s.Q), dot(C, B, "ij,kj"), 0)
    Bt = B.astype(jnp.float32).T
    per_tile = s.tile // s.padded_P
    for tile in range(s.lanes // s.tile):
        at = slice(tile * s.tile, (tile + 1) * s.tile)
        x = x_ref[0, :, at]
        decay = side_by_side(s, prefix, tile).reshape(-1, BLOCK, s.tile) * blocks(tile)[:, None]
        decay = decay.reshape(s.Q, s.tile)
        y = D_ref[:, at] * x.astype(jnp.float32) + fade(from_start[:, at], decay)
        mixed = jnp.zeros(())
        for i in range(per_tile):
            r = tile * per_tile + i
            mixing = between(prefix[:, r : r + 1], far_ref, near_ref, r) * scores
            # Two products with x: what its tokens give to y, and to the state at the end.
            one = dot(jnp.concatenate([mixing, Bt * to_end[r : r + 1]]).astype(x.dtype), x)
            mixed = one if i == 0 else jnp.where(s.lane(one.shape) < i * s.padded_P, mixed, one)
        y_ref[0, :, at] = (y + mixed[: s.Q]).astype(y_ref.dtype)
        h_ref[:, at] = fade(h_ref[:, at], decay[-1:]) + mixed[s.Q :]
