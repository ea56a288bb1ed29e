"""What the sLSTM's forward and backward kernels for TPU share: how arrays lie, and their blocks.

Inside, tokens are [T, B, lanes]: time first, since the recurrence reads a token of the whole batch at a time, and the
cells of all heads beside each other, each head grown to whole registers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.tpu import LANES, SUBLANES

VMEM = 56 << 20
"""Bytes that a kernel may ask for; the least of any chip is 64 MB."""
ROWS = 256
"""Tokens of a chunk, of all sequences together."""
BATCH = 64
"""Sequences of a block at most."""


class Sizes(NamedTuple):
    """Of what one device has."""

    T: int
    B: int
    H: int
    P: int
    dtype: Any  # of products
    L: int  # tokens of a sequence a chunk
    rows: int  # sequences a block
    heads: int  # heads a block
    resets: bool

    @classmethod
    def of(cls, gate: jax.Array, dtype: Any, rows: int, resets: bool) -> "Sizes":
        """As many heads at once as fit: while one waits for its product, others work.

        Raises:
            Unfit: the recurrent connections of one head are too large for VMEM.
        """
        B, T, H, P = gate.shape
        block = min(_up(B, SUBLANES), BATCH)
        L = min(max(rows // block, 1), T)
        for heads in range(H, 0, -1):
            sizes = cls(T, B, H, P, dtype, L, block, heads, resets)
            if H % heads == 0 and sizes.vmem <= VMEM:
                return sizes
        raise Unfit(f"slstm: heads of {P} cells need more than {VMEM >> 20} MB of VMEM")

    @property
    def N(self) -> int:
        """Chunks."""
        return -(-self.T // self.L)

    @property
    def padded_B(self) -> int:
        """Whole blocks."""
        return _up(self.B, self.rows)

    @property
    def padded_P(self) -> int:
        """Whole registers."""
        return _up(self.P, LANES)

    @property
    def lanes(self) -> int:
        """Of a block."""
        return self.heads * self.padded_P

    @property
    def vmem(self) -> int:
        """Bytes of the backward kernel: blocks twice, its scratch, and the products of one head."""
        item, tokens, P = jnp.dtype(self.dtype).itemsize, self.L * self.rows * self.lanes, self.padded_P
        connections = 4 * P * self.lanes
        blocks = 2 * (10 * tokens * item + 4 * self.L * self.rows * LANES + connections * (item + 4))
        return blocks + tokens * (4 * 7 + item) + 16 * self.L * self.rows * P + 4 * connections // self.heads

    def tokens(self, x: jax.Array) -> jax.Array:
        """[B, T, H, P] to [N L, B, H P]."""
        grow = self.padded_B - self.B, self.N * self.L - self.T, 0, self.padded_P - self.P
        x = jnp.pad(x.astype(self.dtype), [(0, more) for more in grow])
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 0, 1)

    def tokens_back(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        x = jnp.swapaxes(x[: self.T, : self.B], 0, 1)
        return x.reshape(self.B, self.T, self.H, -1)[..., : self.P]

    def state(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Each [B, H, P] to [4, B, H P]; zeros are an empty state."""
        stacked = jnp.stack(parts)
        grow = 0, self.padded_B - self.B, 0, self.padded_P - self.P
        return jnp.pad(stacked, [(0, more) for more in grow]).reshape(4, self.padded_B, -1)

    def state_back(self, state: jax.Array) -> tuple[jax.Array, ...]:
        """The inverse."""
        return tuple(state[:, : self.B].reshape(4, self.B, self.H, -1)[..., : self.P])

    def connections(self, R: jax.Array) -> jax.Array:
        """[4, H, P, P] to [H, P, 4 P], the gates beside each other."""
        more = self.padded_P - self.P
        R = jnp.pad(R.astype(self.dtype), ((0, 0), (0, 0), (0, more), (0, more)))
        return jnp.moveaxis(R, 0, 2).reshape(self.H, self.padded_P, -1)

    def connections_back(self, R: jax.Array) -> jax.Array:
        """The inverse."""
        R = jnp.moveaxis(R.reshape(self.H, self.padded_P, 4, -1), 2, 0)
        return R[:, :, : self.P, : self.P]

    def bias(self, bias: jax.Array) -> jax.Array:
        """[4, H, P] to [4, H P]."""
        more = self.padded_P - self.P
        return jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), (0, more))).reshape(4, -1)

    def begins(self, resets: jax.Array | None) -> list[jax.Array]:
        """1 where a document begins, in all lanes of a register, [N L, B, 128]; or nothing."""
        if resets is None:
            return []
        grow = (0, self.padded_B - self.B), (0, self.N * self.L - self.T)
        return [jnp.broadcast_to(jnp.pad(resets, grow).T[..., None].astype(jnp.float32), (*self.shape[:2], LANES))]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of tokens."""
        return self.N * self.L, self.padded_B, self.H * self.padded_P

    def blocks(self, reverse: bool) -> dict[str, tuple[tuple[int, ...], Any, pl.BlockSpec]]:
        """Shapes, dtypes and blocks by name, for the grid (blocks of heads, blocks of the batch, chunks)."""
        (_, B, all_lanes), P, L, N = self.shape, self.padded_P, self.L, self.N
        at = (lambda c: N - 1 - c) if reverse else (lambda c: c)
        f32, rows, lanes = jnp.float32, self.rows, self.lanes
        return {
            "tokens": (self.shape, self.dtype, pl.BlockSpec((L, rows, lanes), lambda h, b, c: (at(c), b, h))),
            "begins": ((*self.shape[:2], LANES), f32, pl.BlockSpec((L, rows, LANES), lambda h, b, c: (at(c), b, 0))),
            "R": ((self.H, P, 4 * P), self.dtype, pl.BlockSpec((self.heads, P, 4 * P), lambda h, b, c: (h, 0, 0))),
            "bias": ((4, all_lanes), f32, pl.BlockSpec((4, lanes), lambda h, b, c: (0, h))),
            "state": ((4, B, all_lanes), f32, pl.BlockSpec((4, rows, lanes), lambda h, b, c: (0, b, h))),
            "starts": (
                (N, 4, B, all_lanes),
                f32,
                pl.BlockSpec((None, 4, rows, lanes), lambda h, b, c: (at(c), 0, b, h)),
            ),
            "dR": (
                (B // rows, self.H, P, 4 * P),
                f32,
                pl.BlockSpec((None, self.heads, P, 4 * P), lambda h, b, c: (b, h, 0, 0)),
            ),
            "d_bias": ((B // rows, 4, all_lanes), f32, pl.BlockSpec((None, 4, lanes), lambda h, b, c: (b, 0, h))),
        }

    def options(self, arguments: str, results: str, reverse: bool, products: int) -> dict[str, Any]:
        """Of a call with arguments and results by the names of their blocks. `products`: of h and R a token."""
        blocks = self.blocks(reverse)
        cells = self.shape[0] * self.shape[1] * self.shape[2]
        moved = cells * jnp.dtype(self.dtype).itemsize * (arguments + results).count("tokens")
        return {
            "out_shape": [jax.ShapeDtypeStruct(*blocks[name][:2]) for name in results.split()],
            "in_specs": [blocks[name][2] for name in arguments.split()],
            "out_specs": [blocks[name][2] for name in results.split()],
            "grid": (self.H // self.heads, self.padded_B // self.rows, self.N),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=max(16 << 20, self.vmem + (8 << 20)),
            ),
            "cost_estimate": pl.CostEstimate(
                flops=products * 8 * self.padded_P * cells, transcendentals=8 * cells, bytes_accessed=moved
            ),
        }

    def steps(self, chunk: Any) -> Any:
        """Tokens of a chunk; the last may have fewer."""
        return self.L if self.T % self.L == 0 else jnp.minimum(self.L, self.T - self.L * chunk)

    def head(self, r: int) -> slice:
        """The lanes of a head of the block."""
        return slice(r * self.padded_P, (r + 1) * self.padded_P)


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Contract dimension a_dim of a with b_dim of b, in the dtype of b, with float32 sums."""
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a.astype(b.dtype), b, dims, precision=precision, preferred_element_type=jnp.float32)


def wide(begins: jax.Array, lanes: int) -> jax.Array:
    """[..., 128] to [..., lanes], booleans."""
    return jnp.concatenate([begins] * (lanes // LANES), -1) > 0


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
