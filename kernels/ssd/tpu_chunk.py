"""What the TPU kernels of state-space duality share: how heads and time are laid out, and the decays of a chunk."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 8  # tokens: the sublanes of a register
VMEM = 64 * 2**20  # of 128 MiB (64 on tpu7x)


class Sizes(NamedTuple):
    """How heads and channels are laid out."""

    G: int  # groups
    H: int  # heads a group
    P: int  # channels a head
    N: int  # the state's size a channel
    padded_H: int
    padded_P: int
    R: int  # heads a block
    Q: int  # tokens a chunk

    @classmethod
    def of(cls, H, P, G, N, chunk, heads):
        """Blocks are whole tiles of 128 lanes, and the tiles whole heads or parts of one head."""
        H //= G
        widths = [2**k for k in range(3, 8) if 2**k >= P] or [-(-P // 128) * 128]
        layouts = [(H + -H % max(1, 128 // width), width) for width in widths]
        padded_H, padded_P = min(layouts, key=lambda layout: (math.prod(layout), layout[0]))
        step = max(1, 128 // padded_P)
        # Whole registers of 8 rows, where that is possible.
        R = max(
            (R for R in range(step, max(step, heads) + 1, step) if padded_H % R == 0), key=lambda R: (R % 8 == 0, R)
        )
        return cls(G, H, P, N, padded_H, padded_P, R, chunk)

    @property
    def J(self):
        """Blocks."""
        return self.G * self.padded_H // self.R

    @property
    def lanes(self):
        """Of a block."""
        return self.R * self.padded_P

    @property
    def tile(self):
        """Lanes of a tile."""
        return max(128, self.padded_P)

    def pad_heads(self, v, channels=False):
        """[..., H] to [..., J R], or [..., H P] to the lanes of all blocks."""
        if (self.H, self.P if channels else 1) == (self.padded_H, self.padded_P if channels else 1):
            return v
        front = v.shape[:-1]
        v = v.reshape(*front, self.G, self.H, -1)
        more = [(0, 0)] * len(front) + [(0, 0), (0, self.padded_H - self.H)]
        v = jnp.pad(v, [*more, (0, self.padded_P - self.P if channels else 0)])
        return v.reshape(*front, -1)

    def cut_heads(self, v, channels=False):
        """The inverse."""
        if (self.H, self.P if channels else 1) == (self.padded_H, self.padded_P if channels else 1):
            return v
        front = v.shape[:-1]
        v = v.reshape(*front, self.G, self.padded_H, -1)[..., : self.H, : self.P if channels else 1]
        return v.reshape(*front, -1)

    def pad_time(self, v):
        """[B, T, ...] to whole chunks; a token of zeros, dt and log decay too, changes nothing."""
        return jnp.pad(v, ((0, 0), (0, -v.shape[1] % self.Q), *((0, 0),) * (v.ndim - 2)))

    def rows(self, v):
        """[B, T, H] to [B, J, R, T]: time in the lanes."""
        v = self.pad_heads(self.pad_time(v))
        return v.swapaxes(1, 2).reshape(v.shape[0], self.J, self.R, -1)

    def state_in(self, h):
        """[B, H, P, N] to [B, J, lanes, N]."""
        h = h.reshape(-1, self.G, self.H, self.P, self.N)
        more = (0, self.padded_H - self.H), (0, self.padded_P - self.P)
        return jnp.pad(h, ((0, 0), (0, 0), *more, (0, 0))).reshape(-1, self.J, self.lanes, self.N)

    def state_out(self, h):
        """The inverse."""
        h = h.reshape(-1, self.G, self.padded_H, self.padded_P, self.N)[:, :, : self.H, : self.P]
        return h.reshape(-1, self.G * self.H, self.P, self.N)

    def specs(self, chunks, reverse):
        """The blocks of a grid over batch, heads and time, by the kind of array."""
        Q, R, N, lanes = self.Q, self.R, self.N, self.lanes
        per_group = self.padded_H // R

        def at(k):
            return chunks - 1 - k if reverse else k

        return {
            "channels": pl.BlockSpec((1, Q, lanes), lambda b, j, k: (b, at(k), j)),
            "rows": pl.BlockSpec((1, 1, R, Q), lambda b, j, k: (b, j, 0, at(k))),
            "group": pl.BlockSpec((1, 1, Q, N), lambda b, j, k: (b, j // per_group, at(k), 0)),
            "block": pl.BlockSpec((1, 1, Q, N), lambda b, j, k: (b, j, at(k), 0)),
            "time": pl.BlockSpec((1, 1, Q), lambda b, j, k: (b, 0, at(k))),
            "D": pl.BlockSpec((1, lanes), lambda b, j, k: (0, j)),
            "heads": pl.BlockSpec((1, R, Q), lambda b, j, k: (j, 0, 0)),
            "sums": pl.BlockSpec((1, 1, R, Q), lambda b, j, k: (b, j, 0, 0)),
            "state": pl.BlockSpec((1, 1, lanes, N), lambda b, j, k: (b, j, 0, 0)),
            "wide state": pl.BlockSpec((1, 1, N, lanes), lambda b, j, k: (b, j, 0, 0)),
            "states": pl.BlockSpec((1, 1, lanes, N), lambda b, j, k: (b, at(k), j, 0)),
        }

    def scratch(self):
        """The decays."""
        sizes = (self.Q // BLOCK, self.R, self.Q), (BLOCK, self.R, self.Q)
        return [pltpu.VMEM(size, jnp.float32) for size in sizes]

    def lane(self, shape):
        """Of each element."""
        return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def arguments(groups):
    """Dimensions for `per_device`: groups are divided with the heads, one group is whole on every device."""
    shared = "B T G N" if groups == 1 else "B T H N"
    return "B T H", "B T H", "B T H", shared, shared, "H", "B H P N", "B T"


def inward(s, x, dt, log_decay, B, C):
    """The inputs as the kernels read them; the log decay is to base 2."""
    return (
        s.pad_heads(s.pad_time(x), channels=True),
        s.rows(dt),
        s.rows(log_decay * math.log2(math.e)),
        s.pad_time(B).swapaxes(1, 2),
        s.pad_time(C).swapaxes(1, 2),
    )


def dot(a, b, contract="ij,jk"):
    """A product on the matrix unit, "ij,jk", "ij,kj" or "ji,jk", summed in float32."""
    dims = {"ij,jk": ((1,), (0,)), "ij,kj": ((1,), (1,)), "ji,jk": ((0,), (0,))}[contract]
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def fade(v, decay):
    """v · decay, and 0 where the decay is, even if v overflowed in another document."""
    return jnp.where(decay > 0, v * decay, 0)


class Spread:
    """A number of each head and token, rows [R, Q], in each of the head's lanes of a tile, [Q, tile].

    A product with zeros and ones, exact in three bfloat16 parts: to broadcast across lanes is slow.
    """

    def __init__(self, s, rows_RxQ):
        self.s = s
        parts, rest = [], rows_RxQ
        for _ in range(3):
            parts.append(rest.astype(jnp.bfloat16).astype(jnp.float32))
            rest -= parts[-1]
        self.columns = jnp.concatenate(parts).T.astype(jnp.bfloat16)

    def __call__(self, tile):
        """[Q, tile]."""
        s = self.s
        head, lane = (jax.lax.broadcasted_iota(jnp.int32, (3 * s.R, s.tile), axis) for axis in (0, 1))
        ones = (head % s.R == (tile * s.tile + lane) // s.padded_P).astype(jnp.bfloat16)
        return dot(self.columns, ones)


class Decays(NamedTuple):
    """Of a chunk, from the log decays [R, Q]; every one a product of what passes, without a difference of sums.

    Between tokens in different blocks, the decay is that from the one to the edge of the block of the other, times
    that from there. So no exponential is taken of a [Q, Q] matrix.
    """

    prefix: jax.Array  # [R, Q]: from before the token's block, itself included
    since_start: jax.Array  # [R, Q]: from before the chunk, the token included
    to_end: jax.Array  # [R, Q]: from after the token to the chunk's end
    blocks: jax.Array  # [R, Q / 8]: from before the chunk to before the block

    @classmethod
    def of(cls, log2_decay, far_ref, near_ref):
        """Also fill far [Q / 8, R, Q] and near [8, R, Q], which `between` reads."""
        Q = log2_decay.shape[1]
        lane = jax.lax.broadcasted_iota(jnp.int32, log2_decay.shape, 1)
        block, inside = lane // BLOCK, lane % BLOCK
        before, after = log2_decay, jnp.zeros_like(log2_decay)
        near_ref[0] = jnp.exp2(after)
        for d in range(1, BLOCK):
            after += jnp.where(inside + d < BLOCK, pltpu.roll(log2_decay, Q - d, 1), 0)
            before += jnp.where(inside >= d, pltpu.roll(log2_decay, d, 1), 0)
            near_ref[d] = jnp.exp2(after)
        prefix, suffix = jnp.exp2(before), jnp.exp2(after)
        blocks = range(Q // BLOCK)
        whole = [jnp.broadcast_to(prefix[:, b * BLOCK + 7 : b * BLOCK + 8], prefix.shape) for b in blocks]
        to_end = since_start = outside = jnp.zeros_like(prefix)
        passed = jnp.ones_like(prefix)
        for b in blocks:
            far_ref[b] = to_end
            to_end = jnp.where(block == b, suffix, to_end * whole[b])
            outside = jnp.where(lane == b, passed, outside)
            passed *= whole[b]
        for b in reversed(blocks):
            since_start = jnp.where(block == b, prefix, since_start * whole[b])
        return cls(prefix, since_start, to_end, outside[:, : len(blocks)])


def side_by_side(s, columns_QxR, tile):
    """A number of each head and token in each of the head's lanes of a tile: see `Spread`."""
    per_tile = s.tile // s.padded_P
    shape = columns_QxR.shape[0], s.tile
    out = jnp.broadcast_to(columns_QxR[:, tile * per_tile : tile * per_tile + 1], shape)
    for i in range(1, per_tile):
        r = tile * per_tile + i
        out = jnp.where(s.lane(shape) < i * s.padded_P, out, jnp.broadcast_to(columns_QxR[:, r : r + 1], shape))
    return out


def between(prefix_Qx1, far_ref, near_ref, r):
    """The decays of head r, [Q, Q], from the tokens of lanes to those of rows; 0 above the diagonal."""
    Q = far_ref.shape[2]
    shape = Q // BLOCK, BLOCK, Q
    block, row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    distance = row[:1] - lane[:1] % BLOCK
    near = jnp.zeros((1, BLOCK, Q), jnp.float32)
    for d in range(BLOCK):
        near = jnp.where(distance == d, near_ref[d, r : r + 1][None], near)
    far = jnp.broadcast_to(prefix_Qx1, (Q, Q)).reshape(shape) * far_ref[:, r : r + 1]
    return jnp.where(lane // BLOCK == block, near, far).reshape(Q, Q)


def triangle(Q, dtype=bool):
    """1 at [i, j] where j ≤ i."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
    return (column <= row).astype(dtype)
