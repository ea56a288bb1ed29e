"""WKV-7 for TPU: what its kernels share, the layout of their arrays and the mathematics of one chunk.

As in `xla`, with S the state [V, K] at the start of a chunk and P_t the product of the decays up to token t, both
relative to c, the root of the whole chunk's, so that no exponent exceeds L max |log_w| / 2:

    U = T (A_ak V + a Sᵀ),   T = (I - A_ab)^-1      A_xz[t, s] = (P_{t-1} a_t / c) · (c z_s / P_s) for s < t
    Y = A_rb U + A_rk V + r Sᵀ                      A_rz[t, s] = (P_t r_t / c) · (c z_s / P_s) for s <= t

A group is the heads that share 128 lanes: G heads of N = K = V channels. Its arrays are [L, (G, N)], its matrices
[L, (G, L)], its states [V, (G, K)]: heads side by side, which is how a matrix of the left is used. On the right, as
the stationary side of the matrix unit, stands the block diagonal of the heads (`apart`). A step of the grid does
several groups, which are independent. The compiler keeps to the order of the program, more or less: so that it finds
work while one group waits for the matrix unit, each is a generator that yields there, and they take turns (`together`).
"""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.tpu import LANES, SUBLANES

VMEM = 64 * 2**20  # of 128 MiB (64 on tpu7x)


class Blocks(NamedTuple):
    """How the work is divided."""

    chunk: int  # tokens, a power of two, at least 16
    chunks: int  # that a step of the grid does, at most
    groups: int  # of 128 lanes, that a step of the grid does, at most


class Layout:
    """Arrays [B, T, (H, N)], states [B, N, (H, N)], on the grid (batch, heads, time), padded to whole blocks."""

    def __init__(self, blocks: Blocks, N: int, shape: tuple[int, int, int], dtype, reverse: bool = False):
        B, self.T, self.width = shape
        self.N, self.L, self.dtype, self.reverse = N, blocks.chunk, dtype, reverse
        self.lanes = self.width + -self.width % LANES
        self.groups = max(n for n in range(1, blocks.groups + 1) if self.lanes // LANES % n == 0)
        self.chunks = min(blocks.chunks, -(-self.T // self.L))  # of a step
        self.steps = -(-self.T // (self.L * self.chunks))
        self.grid = (B, self.lanes // LANES // self.groups, self.steps)
        self.padded = (B, self.steps * self.chunks * self.L, self.lanes)
        self.states = (B, self.steps * self.chunks, N, self.lanes)

    def _spec(self, shape, index, **options):
        def of(b, h, t):
            return index(b, h, self.steps - 1 - t if self.reverse else t)

        return pl.BlockSpec((None, *shape), of, **options)

    @property
    def by_time(self):
        """Of an input or output."""
        return self._spec((self.chunks * self.L, self.groups * LANES), lambda b, h, t: (b, t, h))

    @property
    def by_chunk(self):
        """Of the states at the start of every chunk, [B, chunks, N, (H, N)]."""
        return self._spec((self.chunks, self.N, self.groups * LANES), lambda b, h, t: (b, t, 0, h))

    @property
    def whole(self):
        """Of a state."""
        return self._spec((self.N, self.groups * LANES), lambda b, h, t: (b, 0, h))

    @property
    def by_group(self):
        """The lanes of each group of a step."""
        return [slice(i * LANES, (i + 1) * LANES) for i in range(self.groups)]

    @property
    def by_document(self):
        """Of `documents`."""
        shape = (self.chunks, 1, self.L + 1)
        return self._spec(shape, lambda b, h, t: (b, t, 0, 0), memory_space=pltpu.SMEM)

    @property
    def scratch(self):
        """For the state of a step's heads."""
        return pltpu.VMEM((self.N, self.groups * LANES), jnp.float32)

    @property
    def options(self):
        """Of `pallas_call`."""
        semantics = ("parallel", "parallel", "arbitrary")
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
        return {"grid": self.grid, "compiler_params": params}

    def cost(self, squares: int, states: int, arrays) -> pl.CostEstimate:
        """For products of [L, L] with [L, N] and of [L, N] with [N, N], so many for each chunk and head."""
        macs = (squares * self.L + states * self.N) * self.N * self.padded[1] * self.lanes // self.N
        return pl.CostEstimate(
            flops=2 * self.grid[0] * macs,
            transcendentals=3 * math.prod(self.padded),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        )

    def pad(self, x):
        """[B, T, (H, N)] to whole blocks. Zeros leave the state as it is."""
        return jnp.pad(x, [(0, whole - size) for whole, size in zip(self.padded, x.shape, strict=True)])

    def cut(self, x):
        """The inverse of `pad`."""
        return x[:, : self.T, : self.width]

    def merge(self, S_BxHxVxK):
        """As the kernels have it, [B, V, (H, K)]."""
        B, H, V, K = S_BxHxVxK.shape
        S = jnp.swapaxes(S_BxHxVxK, 1, 2).reshape(B, V, H * K)
        return jnp.pad(S, ((0, 0), (0, 0), (0, self.lanes - self.width)))

    def split(self, S):
        """The inverse of `merge`."""
        B, V, _ = S.shape
        return jnp.swapaxes(S[..., : self.width].reshape(B, V, -1, self.N), 1, 2)

    def documents(self, resets):
        """How many documents a chunk has, and where in the chunk each ends; int32 [B, chunks, 1, 1 + L]."""
        B, T, _ = self.padded
        resets = jnp.pad(resets, ((0, 0), (0, T - self.T))).reshape(B, -1, self.L)
        document = jnp.cumsum(resets, -1)
        ends = jnp.sum(document[..., None, :] <= jnp.arange(self.L)[:, None], -1)
        return jnp.concatenate([document[..., -1:] + 1, ends], -1)[:, :, None].astype(jnp.int32)


def each_document(documents_ref, i, L: int, run, reverse: bool = False):
    """Call run(inside, first) for each document of chunk i of the step; inside(x) is x [L, ...] there, 0 elsewhere.

    Without documents, the chunk is one.
    """
    if documents_ref is None:
        run(lambda x: x, True)
        return
    count = documents_ref[i, 0, 0]

    def one(n, _):
        d = count - 1 - n if reverse else n
        start, end = jnp.where(d == 0, 0, documents_ref[i, 0, jnp.maximum(d, 1)]), documents_ref[i, 0, d + 1]

        def inside(x):
            row = iota(x.shape, 0)
            return jnp.where((row >= start) & (row < end), x, jnp.zeros_like(x))

        run(inside, d == 0)
        return 0

    jax.lax.fori_loop(0, count, one, 0)


class Chunk(NamedTuple):
    """A chunk of a group, in float32, although what takes part in products has been or will be rounded for them."""

    scales: tuple[jax.Array, jax.Array, jax.Array]  # P_{t-1} / c, P_t / c, c / P_t, [L, (G, K)]
    root: jax.Array  # c = P_L / c, [1, (G, K)]: scales the state for use in the chunk, and again for its end
    reads: jax.Array  # a and r, one below the other, [2L, (G, K)], rounded
    writes: jax.Array  # b and k, likewise
    by_b: jax.Array  # A_ab and A_rb, [2L, (G, L)]
    by_k: jax.Array  # A_ak and A_rk, [2L, (G, L)]
    inverse: jax.Array  # T, [L, (G, L)]
    S: jax.Array  # the state at the start times c, [V, (G, K)]
    v: jax.Array  # [L, (G, V)]
    U: jax.Array  # [L, (G, V)]
    read: jax.Array  # A_rk V + r Sᵀ, [L, (G, V)]


def together(tasks: list[Generator[None, None, Any]]) -> Generator[None, None, list]:
    """Run generators in turns, each to its next yield, and return what they return."""
    results: list = [None] * len(tasks)
    waiting = dict(enumerate(tasks))
    while waiting:
        for i, task in tuple(waiting.items()):
            try:
                next(task)
            except StopIteration as end:
                results[i] = end.value
                del waiting[i]
        yield
    return results


def finish(task: Generator[None, None, Any]) -> None:
    """Run a generator to its end."""
    for _ in task:
        pass


def chunk(r, log_w, k, v, a, b, S, N: int, dtype, output: bool) -> Generator[None, None, Chunk]:
    """From inputs [L, (G, N)] and a state [V, (G, K)]; the products in `dtype`, all else in float32.

    What only the output needs (`read`) is left out unless `output`.
    """
    L = r.shape[0]
    r, log_w, k, v, a, b = (x.astype(jnp.float32) for x in (r, log_w, k, v, a, b))
    log_P = cumsum(log_w)
    log_c = log_P[-1:] / 2
    root = jnp.exp(log_c)
    before, now, back = jnp.exp(log_P - log_w - log_c), jnp.exp(log_P - log_c), jnp.exp(log_c - log_P)
    reads = rounded(jnp.concatenate([a * before, r * now]), dtype)
    b, k = rounded(b * back, dtype), rounded(k * back, dtype)
    yield
    by_b = causal(matmul_t(reads, apart(b, N), dtype), L)
    yield
    by_k = causal(matmul_t(reads, apart(k, N), dtype), L)
    S = S * root

    def read():
        rows = 2 * L if output else L
        from_state = matmul_t(reads[:rows], apart(S, N), dtype)
        yield
        from_values = matmul(by_k[:rows], apart(v, N), dtype)
        yield
        return from_state + from_values

    inverse, found = yield from together([_inverse(by_b[:L], dtype), read()])
    U = rounded(matmul(inverse, apart(found[:L], N), dtype), dtype)
    yield
    return Chunk((before, now, back), root, reads, jnp.concatenate([b, k]), by_b, by_k, inverse, S, v, U, found[L:])


def causal(A, L: int):
    """Zero what is not of the past in [(a, r), (G, L)]: s < t for a, s <= t for r."""
    row, column = iota(A.shape, 0), iota(A.shape, 1) % L
    return jnp.where(column < jnp.where(row < L, row, row - L + 1), A, 0)


def _inverse(A, dtype) -> Generator[None, None, jax.Array]:
    """(I - A)^-1 of G strictly lower triangular matrices side by side, float32 [L, (G, L)].

    Row by row for blocks on the diagonal, on the vector unit; then from the inverse of the blocks to that of blocks of
    twice their size, by products. Nothing is subtracted that has grown, so that it is as exact as these.

    The blocks of all heads, [n, n] each, stand side by side, [n, (G, L / n, n)].
    """
    L, W = A.shape
    n = SUBLANES
    lane, row = iota((n, W), 1), iota((n, W), 0)
    block = _pick(A, 0, n, n)
    T = jnp.where(lane % n == row, 1.0, 0.0)
    for j in range(n - 1):
        T += jnp.take_along_axis(block, lane // n * n + j, axis=1) * T[j : j + 1]
        yield
    while n < L:
        odd = iota(T.shape, 1) // n % 2 == 1
        upper, lower = jnp.where(odd, 0, T), jnp.where(odd, T, 0)
        corner = jnp.where(odd, 0, _pick(A, n, n, 2 * n))
        corner = matmul(corner, _spread(jnp.concatenate([upper, lower])), dtype)
        yield
        corner = matmul(lower, _spread(jnp.concatenate([jnp.zeros_like(corner), corner])), dtype)
        yield
        T = jnp.concatenate([upper, lower + corner])
        n *= 2
    return T


def _pick(A, first: int, rows: int, size: int):
    """Rows first : first + rows of every block [size, size] on the diagonals of [L, (G, L)], as [rows, (G, L)]."""
    L, W = A.shape
    block = iota((rows, W), 1) % L // size
    result = A[first : first + rows]
    for i in range(1, L // size):
        result = jnp.where(block == i, A[i * size + first :][:rows], result)
    return result


def _spread(T):
    """From blocks side by side, [n, (W / n, n)], to the block diagonal matrix [W, W]."""
    n, W = T.shape
    block = iota(T.shape, 1) // n
    return jnp.concatenate([jnp.where(block == i, T, 0) for i in range(W // n)])


def apart(x, size: int):
    """Block diagonal: [L, (G, size)] to float32 [(G, L), (G, size)], zero where the heads differ."""
    G = x.shape[1] // size
    x = x.astype(jnp.float32)  # the vector unit has no narrower numbers
    head = iota(x.shape, 1) // size
    return x if G == 1 else jnp.concatenate([jnp.where(head == g, x, 0) for g in range(G)])


def own(x, size: int):
    """The diagonal blocks: [(G, L), (G, size)] to [L, (G, size)]."""
    G = x.shape[1] // size
    L = x.shape[0] // G
    head = iota((L, x.shape[1]), 1) // size
    result = x[:L]
    for g in range(1, G):
        result = jnp.where(head == g, x[g * L : (g + 1) * L], result)
    return result


def rounded(x, dtype):
    """To dtype, kept in float32."""
    return x.astype(dtype).astype(jnp.float32)


def cumsum(x, reverse: bool = False):
    """Sums of the rows up to and with each, or from each on if `reverse`."""
    L, rows = x.shape[0], iota((SUBLANES, x.shape[1]), 0)
    parts = [x[i : i + SUBLANES] for i in range(0, L, SUBLANES)]
    total, sums = jnp.zeros_like(x[:1]), []
    for part in reversed(parts) if reverse else parts:
        for shift in (1, 2, 4):
            if reverse:
                part += jnp.where(rows < SUBLANES - shift, pltpu.roll(part, SUBLANES - shift, 0), 0)
            else:
                part += jnp.where(rows >= shift, pltpu.roll(part, shift, 0), 0)
        part += total
        total = part[:1] if reverse else part[-1:]
        sums.append(part)
    return jnp.concatenate(sums[::-1] if reverse else sums)


def iota(shape, axis):
    """Indices along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(x, y, x_axis: int, y_axis: int, dtype):
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype), y.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def matmul(x, y, dtype):
    """X Y, of numbers rounded to dtype, in float32."""
    return _dot(x, y, 1, 0, dtype)


def matmul_t(x, y, dtype):
    """X Yᵀ, likewise."""
    return _dot(x, y, 1, 1, dtype)


def t_matmul(x, y, dtype):
    """Xᵀ Y, likewise."""
    return _dot(x, y, 0, 0, dtype)
