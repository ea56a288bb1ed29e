"""What the mLSTM's forward and backward kernels for TPU share: their blocks, and the decays of a chunk."""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.tpu import LANES

VMEM = 48 << 20
"""Bytes that a kernel may ask for; the least of any chip is 64 MB."""
TILE = 128
"""Tokens; a square of them is a fourth of the registers."""

COARSE, FINE, SOURCE, FROM_START, TO_END, LEAST, RUN, FROM = range(8)
"""Rows of the block of a chunk, [8, L].

COARSE + FINE: sum of the logarithms of the decays from the chunk's start. The sums can be large and their differences
small: their multiples of 1/256 are summed apart, which is exact. SOURCE: logarithm of what the token is written with
and of the scale of queries, less FINE. FROM_START: what is left of the memory at the chunk's start at the token,
TO_END: of what the token writes at the chunk's end. LEAST: exp(-m), the least normaliser. FROM: where m comes from,
1: from m before, -1: from i, 0: neither. RUN: how many tokens up to this are not 1 there.
"""


HEADS, HEADS_BACKWARD = 2048, 512
"""Lanes of the heads of a block, at most: the more take turns, the less they wait for products."""


def check_fits(L, K, V, dtype) -> None:
    """Raise `Unfit` if the backward kernel needs more VMEM than there is."""
    needed = _vmem(L, up(K, LANES), up(V, LANES), jnp.dtype(dtype).itemsize)
    if needed > VMEM:
        raise Unfit(
            f"mlstm: heads of {K} x {V} and chunks of {L} tokens need {needed >> 20} MB of {VMEM >> 20} MB VMEM"
        )


def _vmem(L, K, V, itemsize, heads=1):
    """Bytes, roughly: the blocks twice, and what is computed."""
    blocks = 2 * heads * (L * (4 * K + 3 * V) * itemsize + K * V * (itemsize + 4 + 4))
    return blocks + 4 * heads * (8 * L * L + 4 * L * (K + V) + 2 * K * V)


def heads_at_once(H, L, K, V, itemsize, lanes):
    """In one block: while one waits for its products, others work."""
    most = max(1, lanes // max(K, V))
    return max(R for R in range(1, most + 1) if H % R == 0 and (R == 1 or _vmem(L, K, V, itemsize, R) <= VMEM))


class Call:
    """Shapes and blocks by name, for the grid (batch, heads, chunks). Sizes of heads are grown to whole registers.

    "k", "v": tokens [B, N L, H K], [B, N L, H V]; "gates": [B, H, N, 8, L]; "C": [B, H, K, V], "n": [B, H, 1, K] and
    "m": [B, H, 1, 1], a block a head; "C_start", "n_start": [B, H, N, K, V], [B, H, N, 1, K].
    """

    def __init__(self, q, v, gates, *, reverse):
        """Of q [B, T, H, K], v [B, T, H, V] and gates [B, H, N, 8, L]; `reverse`: the last chunk first."""
        (B, self.T, H, K), self.dtype = q.shape, q.dtype
        N, rows, L = gates.shape[2:]
        K, V = up(K, LANES), up(v.shape[-1], LANES)
        self.sizes = B, N, H, L, K, V
        self.heads = R = heads_at_once(H, L, K, V, q.dtype.itemsize, HEADS_BACKWARD if reverse else HEADS)
        self.blocks = {  # shape, dtype, block; then the place of the chunk in the index, and that of the head
            "k": ((B, N * L, H * K), q.dtype, (1, L, R * K), "bch"),
            "v": ((B, N * L, H * V), q.dtype, (1, L, R * V), "bch"),
            "gates": ((B, H, N, rows, L), jnp.float32, (1, R, 1, rows, L), "bhc00"),
            "d_gates": ((B, H, 2, N * L), jnp.float32, (1, R, 2, L), "bh0c"),
            "C": ((B, H, K, V), jnp.float32, (1, R, K, V), "bh00"),
            "n": ((B, H, 1, K), jnp.float32, (1, R, 1, K), "bh00"),
            "m": ((B, H, 1, 1), jnp.float32, (1, R, 1, 1), "bh00"),
            "C_start": ((B, H, N, K, V), q.dtype, (1, R, 1, K, V), "bhc00"),
            "n_start": ((B, H, N, 1, K), jnp.float32, (1, R, 1, 1, K), "bhc00"),
        }
        self.chunk = (lambda c: N - 1 - c) if reverse else (lambda c: c)
        self.options = {
            "grid": (B, H // R, N),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=max(16 << 20, _vmem(L, K, V, q.dtype.itemsize, R)),
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


class Chunk:
    """The gates of a chunk of a head, as rows [1, L] and columns [L, 1], and its tokens in tiles.

    What would be [L, L] is made and used tile by tile, those of tokens read before they are written left out.
    """

    def __init__(self, gates_RxL, scale):
        """Of the block; `scale` is that of queries."""
        self.L = gates_RxL.shape[1]
        self.gates_RxL, self.gates_LxR = gates_RxL, gates_RxL.T
        size = min(TILE, self.L)
        self.tiles = [slice(t, t + size) for t in range(0, self.L, size)]
        self.causal = causal(size)
        self.to_end, self.least = self.column(TO_END), self.column(LEAST)
        self.whole = self.gates_LxR[self.L - 1 :, FROM_START : FROM_START + 1]  # [1, 1]
        self.read_start = self.column(FROM_START) * scale

    def row(self, r, tile=slice(None)):
        """[1, L], or a tile of it."""
        return self.gates_RxL[r : r + 1, tile]

    def column(self, r, tile=slice(None)):
        """[L, 1], or a tile of it."""
        return self.gates_LxR[tile, r : r + 1]

    def between(self, t, s):
        """What is left at the tokens of tile t of what those of tile s wrote, times the scale: [t, s].

        0 between documents, of whose logarithms one is -128 at least.
        """
        coarse = self.column(COARSE, t) - self.row(COARSE, s)
        decay = coarse + (self.column(FINE, t) + self.row(SOURCE, s))
        return jnp.exp(jnp.where(self.causal, decay, -jnp.inf) if t == s else decay)

    def norm(self, t, read, epsilon):
        """What is divided by in tile t, and its derivative by what is read of the normaliser; [L, 1]."""
        least = self.least[t]
        slope = jnp.where(jnp.abs(read) >= least, jnp.sign(read), 0)
        return jnp.maximum(jnp.abs(read), least) + epsilon, slope


def in_turns(head, heads):
    """Each head's program, a generator, up to its next `yield`, and again: one's products take the time of others'."""
    for _ in itertools.zip_longest(*map(head, range(heads))):
        pass


def dot(dtype, a, b, a_dim, b_dim):
    """Contract dimension a_dim of a with b_dim of b, in `dtype`, with float32 sums."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def sums(dot, x, weights=1.0):
    """Of the rows of x, times weights [1, size], in all lanes.

    By the matrix unit in bfloat16, unless heads are so large that the vector units wait for it.
    """
    if x.dtype == jnp.float32 or x.shape[1] > 256:
        return jnp.broadcast_to(jnp.sum(x.astype(jnp.float32) * weights, 1, keepdims=True), (len(x), LANES))
    return dot(x, jnp.broadcast_to(jnp.asarray(weights), (LANES, x.shape[1])), 1, 1)


def wide(x, size):
    """[L, 128], the same in all lanes, to [L, size]."""
    return jnp.concatenate([x] * (size // LANES), 1)


def inverse(x, dtype):
    """1 / x, to about 16 bits where all that it multiplies is rounded to bfloat16."""
    if dtype == jnp.float32:
        return 1 / x
    guess = pltpu.reciprocal(x, approx=True)
    return guess * (2 - x * guess)


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
