"""What the mLSTM's forward and backward kernels for TPU share: their blocks, and the decays of a chunk."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.tpu import LANES

VMEM = 48 << 20
"""Bytes that a kernel may ask for; the least of any chip is 64 MB."""

COARSE, FINE, DOCUMENT, RUN, WEIGHT, LEAST, KEPT, WROTE = range(8)
"""Rows of the block of a chunk, [8, L].

COARSE + FINE: sum of the logarithms of the decays from the chunk's start. The sums can be large and their differences
small: their multiples of 1/256 are summed apart, which is exact. DOCUMENT: how many begin in the chunk up to the
token. WEIGHT: logarithm of what the token is written with. LEAST: exp(-m), the least normaliser. KEPT: 1 where
m = log f + m before, WROTE: 1 where m = i, RUN: how many tokens up to this are not KEPT.
"""


def check_fits(L, K, V, dtype) -> None:
    """Raise `Unfit` if the backward kernel needs more VMEM than there is."""
    needed = _vmem(L, up(K, LANES), up(V, LANES), jnp.dtype(dtype).itemsize)
    if needed > VMEM:
        raise Unfit(
            f"mlstm: heads of {K} x {V} and chunks of {L} tokens need {needed >> 20} MB of {VMEM >> 20} MB VMEM"
        )


def _vmem(L, K, V, itemsize):
    """Bytes, roughly: the blocks twice, and what is computed."""
    blocks = 2 * (L * (4 * K + 3 * V) * itemsize + K * V * (itemsize + 4 + 4))
    return blocks + 4 * (8 * L * L + 4 * L * (K + V) + 2 * K * V)


class Call:
    """Shapes and blocks by name, for the grid (batch, heads, chunks). Sizes of heads are grown to whole registers.

    "k", "v": tokens [B, N L, H K], [B, N L, H V]; "gates": [B, H, N, 8, L]; "C": [B, H, K, V], "n": [B, H, 1, K] and
    "m": [B, H, 1, 1], one block a head; "C_start", "n_start": [B, H, N, K, V], [B, H, N, 1, K].
    """

    def __init__(self, q, v, gates, *, reverse):
        """Of q [B, T, H, K], v [B, T, H, V] and gates [B, H, N, 8, L]; `reverse`: the last chunk first."""
        (B, self.T, H, K), self.dtype = q.shape, q.dtype
        N, rows, L = gates.shape[2:]
        K, V = up(K, LANES), up(v.shape[-1], LANES)
        self.sizes = B, N, H, L, K, V
        self.blocks = {  # shape, dtype, block; then the place of the chunk in the index, and that of the head
            "k": ((B, N * L, H * K), q.dtype, (1, L, K), "bch"),
            "v": ((B, N * L, H * V), q.dtype, (1, L, V), "bch"),
            "gates": ((B, H, N, rows, L), jnp.float32, (1, 1, 1, rows, L), "bhc00"),
            "d_gates": ((B, H, 2, N * L), jnp.float32, (1, 1, 2, L), "bh0c"),
            "C": ((B, H, K, V), jnp.float32, (1, 1, K, V), "bh00"),
            "n": ((B, H, 1, K), jnp.float32, (1, 1, 1, K), "bh00"),
            "m": ((B, H, 1, 1), jnp.float32, (1, 1, 1, 1), "bh00"),
            "C_start": ((B, H, N, K, V), q.dtype, (1, 1, 1, K, V), "bhc00"),
            "n_start": ((B, H, N, 1, K), jnp.float32, (1, 1, 1, 1, K), "bhc00"),
        }
        self.chunk = (lambda c: N - 1 - c) if reverse else (lambda c: c)
        self.options = {
            "grid": (B, H, N),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=max(16 << 20, _vmem(L, K, V, q.dtype.itemsize)),
            ),
        }

    def shapes(self, names: str):
        """Of results."""
        return tuple(jax.ShapeDtypeStruct(*self.blocks[name][:2]) for name in names.split())

    def specs(self, names: str):
        """Blocks of arguments or results."""

        def spec(block, index):
            def place(b, h, c):
                at = {"b": b, "h": h, "c": self.chunk(c), "0": 0}
                return tuple(at[letter] for letter in index)

            return pl.BlockSpec(block, place)

        return tuple(spec(*self.blocks[name][2:]) for name in names.split())

    def arrays(self, names: str, *arrays):
        """Arguments as the blocks have them: the zeros they grow by write nothing, and nothing reads them."""
        grown = []
        for name, array in zip(names.split(), arrays, strict=True):
            shape = self.blocks[name][0]
            sizes = (shape[1], array.shape[2], shape[2] // array.shape[2]) if name in "kv" else shape[-2:]
            grown.append(pad(array, *sizes).reshape(shape))
        return grown

    def tokens(self, x, size):
        """A result "k" or "v" as [B, T, H, size]."""
        B, _, H, *_ = self.sizes
        return x[:, : self.T].reshape(B, self.T, H, -1)[..., :size]

    def cost(self, products, numbers):
        """For XLA: multiplications and additions in products, and numbers that move, of a chunk."""
        B, N, H, L, *_ = self.sizes
        each = B * H * N
        return pl.CostEstimate(
            flops=2 * each * products,
            transcendentals=each * L * L,
            bytes_accessed=each * (numbers * self.dtype.itemsize + 32 * L),
        )


class Decays(NamedTuple):
    """What is left of what was written, when it is read; in [0, 1], and 0 between documents.

    `between` and `from_start` include the scale of what is read, `between` and `to_end` the weight of what is written.
    """

    between: jax.Array  # [t, s], from token s to t
    from_start: jax.Array  # [L, 1], from before the first token to each
    to_end: jax.Array  # [L, 1], from each token to the last
    whole: jax.Array  # [1, 1], from before the first token to the last
    least: jax.Array  # [L, 1], the row LEAST


def decays(gates_RxL, scale) -> Decays:
    """Of a chunk."""
    L = gates_RxL.shape[1]
    gates_LxR = gates_RxL.T
    row, column, end = (
        [gates_RxL[r : r + 1] for r in range(len(gates_RxL))],
        [gates_LxR[:, r : r + 1] for r in range(len(gates_RxL))],
        [gates_LxR[L - 1 :, r : r + 1] for r in range(len(gates_RxL))],
    )

    def between(later, earlier, scale):
        decay = (later[COARSE] - earlier[COARSE]) + (later[FINE] - earlier[FINE])
        left = jnp.exp(jnp.minimum(decay, 0) + (earlier[WEIGHT] + math.log(scale)))
        return jnp.where(later[DOCUMENT] == earlier[DOCUMENT], left, 0)

    from_start = jnp.where(column[DOCUMENT] == 0, jnp.exp(column[COARSE] + column[FINE]), 0)
    return Decays(
        between=jnp.where(causal(L), between(column, row, scale), 0),
        from_start=from_start * scale,
        to_end=between(end, column, 1),
        whole=from_start[L - 1 :],
        least=column[LEAST],
    )


def norm(q, n, product, decay: Decays, epsilon):
    """What is divided by, and its derivative by what is read of the normaliser; [L, 1]."""
    read = jnp.sum(product, 1, keepdims=True)
    read += times(decay.from_start, jnp.sum(q.astype(jnp.float32) * n, 1, keepdims=True))
    slope = jnp.where(jnp.abs(read) >= decay.least, jnp.sign(read), 0)
    return jnp.maximum(jnp.abs(read), decay.least) + epsilon, slope


def dot(dtype, a, b, a_dim, b_dim):
    """Contract dimension a_dim of a with b_dim of b, in `dtype`, with float32 sums."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def times(decay, x):
    """decay · x, and 0 where nothing is left, whatever x was: another document's may have overflowed."""
    return jnp.where(decay > 0, decay * x, 0)


def causal(L):
    """[t, s]: t >= s."""
    return jax.lax.broadcasted_iota(jnp.int32, (L, L), 0) >= jax.lax.broadcasted_iota(jnp.int32, (L, L), 1)


def up(size, multiple):
    """The next multiple."""
    return -(-size // multiple) * multiple


def pad(x, *multiples, value=0.0):
    """The last dimensions grown to multiples of these."""
    extra = [(0, -size % multiple) for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(multiples)) + extra, constant_values=value)
