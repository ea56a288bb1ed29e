"""What the forward and the backward kernel of the TPU have in common: sizes, layouts and the way tokens come in."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phyla.kernels.dispatch import Unfit
from phyla.kernels.tpu import LANES, SUBLANES, kind

ROWS = SUBLANES
"""Tokens that are loaded at a time."""
GROUP = 4
"""States that go through SUBLANES tokens together: more do not stay in registers."""
CHANNELS = SUBLANES * LANES
VMEM = 48 << 20
"""Bytes that a kernel may ask for; the least of any chip is 64 MB."""
BLOCKS = {"": (16, 8)}
"""Kind of chip -> tokens of a chunk, tokens of the unrolled body of a loop; here for the interpreter, else DEFAULT."""
DEFAULT = 256, 64


class Sizes(NamedTuple):
    """Tokens T, channels D, states N; channels in K blocks; tokens of a chunk and of the body of its loop."""

    T: int
    D: int
    N: int
    K: int
    chunk: int
    body: int
    resets: bool  # whether there are any: then they are a column of the tokens, after B and C

    @classmethod
    def of(cls, x: jax.Array, A: jax.Array, resets: jax.Array | None, chunk: int | None) -> "Sizes":
        """Blocks for this chip, the largest that fit x [B, T, D] and A [D, N]. Raises `Unfit`."""
        (_, T, D), (_, N) = x.shape, A.shape
        most, body = BLOCKS.get(kind(), DEFAULT)
        most = up(min(chunk or most, T), ROWS)
        body = min(body, most)
        most = up(most, body)
        while True:
            sizes = cls(T, D, N, up(D, CHANNELS) // CHANNELS, most, body, resets is not None)
            if sizes.vmem <= VMEM:
                return sizes
            if most <= body:
                raise Unfit(f"{N} states of {D} channels need {sizes.vmem >> 20} MB of {VMEM >> 20} MB VMEM")
            most = up(most // 2, body)

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return -(-self.T // self.chunk)

    @property
    def columns(self) -> int:
        """Numbers a token that are the same for all channels."""
        return 2 * self.N + self.resets

    @property
    def rows(self) -> int:
        """N in whole registers."""
        return up(self.N, SUBLANES)

    @property
    def vmem(self) -> int:
        """Bytes that the backward kernel needs; the forward kernel needs less. Blocks count twice."""
        registers = self.chunk * (self.N + 3 + self.columns / 8 + self.rows / 4 + 2 * 5) + 8 * self.K * (self.N + 8)
        return int(registers + 2 * self.N + self.body * (3 + self.rows)) * 4 * CHANNELS

    def options(self, batch: int, name: str, per_state: int) -> dict[str, Any]:
        """Of `pallas_call`; `per_state`: operations a state and token, one exp among them."""
        states = batch * self.T * self.D * self.N
        return {
            "name": name,
            "grid": (batch, self.chunks, self.K),
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=max(16 << 20, self.vmem + (4 << 20)),
            ),
            "cost_estimate": pl.CostEstimate(
                flops=per_state * states,
                transcendentals=states,
                bytes_accessed=per_state * batch * self.T * self.D,
            ),
        }

    def shape(self, name: str, batch: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """Of the array called `name`; "B T D" has the caller's layout."""
        N, tile = self.N, (SUBLANES, LANES)
        shapes = {
            "inputs": (batch, self.T, self.D),
            "tokens": (batch, self.chunks * self.chunk, self.columns),
            "A": (self.K, N, *tile),
            "D": (1, self.K * CHANNELS),
            "state": (batch, self.K, N, *tile),
            "starts": (batch, self.chunks, self.K, N, *tile),
            "dD": (batch, self.K, SUBLANES * SUBLANES, LANES),
            "sums": (batch, self.chunks, 2 * self.rows, self.chunk),
        }
        return jax.ShapeDtypeStruct(shapes[name], dtype)

    def spec(self, name: str, reverse: bool = False) -> pl.BlockSpec:
        """The block of the array called `name`; what is "state" or "dD" stays in VMEM for a whole row of the batch."""
        N, L, tile = self.N, self.chunk, (SUBLANES, LANES)

        def at(c):
            return self.chunks - 1 - c if reverse else c

        specs = {
            "inputs": ((1, L, CHANNELS), lambda b, c, k: (b, at(c), k)),
            "tokens": ((1, L, self.columns), lambda b, c, k: (b, at(c), 0)),
            "A": ((self.K, N, *tile), lambda b, c, k: (0, 0, 0, 0)),
            "D": ((1, CHANNELS), lambda b, c, k: (0, k)),
            "state": ((1, self.K, N, *tile), lambda b, c, k: (b, 0, 0, 0, 0)),
            "starts": ((1, 1, 1, N, *tile), lambda b, c, k: (b, at(c), k, 0, 0, 0)),
            "dD": ((1, self.K, SUBLANES * SUBLANES, LANES), lambda b, c, k: (b, 0, 0, 0)),
            "sums": ((1, 1, 2 * self.rows, L), lambda b, c, k: (b, at(c), 0, 0)),
        }
        return pl.BlockSpec(*specs[name])

    @property
    def groups(self) -> list[slice]:
        """The states, GROUP at a time."""
        return [slice(n, min(n + GROUP, self.N)) for n in range(0, self.N, GROUP)]

    def load(self, ref, token, chunk) -> jax.Array:
        """float32 [ROWS, CHANNELS] from a token of the chunk on; zeros outside of T and D."""
        v = ref[0, pl.ds(token, ROWS), :].astype(jnp.float32)
        if self.T % self.chunk:
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < self.T - chunk * self.chunk - token, v, 0)
        if self.D % CHANNELS:
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) < self.D - pl.program_id(2) * CHANNELS, v, 0)
        return v

    def turn(self, v, ref, token) -> None:
        """Store [ROWS, CHANNELS] in ref [body * 8, 128] as a register of [8, 128] a token, from `token` on."""
        for j in range(SUBLANES):
            at = pl.ds(token * SUBLANES + j, ROWS, stride=SUBLANES)
            ref[at, :] = v[:, j * LANES : (j + 1) * LANES]

    def store(self, v, ref, token) -> None:
        """Store one token's register of [8, 128] in ref [body * 8, 128] for `turned`."""
        at = token // SUBLANES * SUBLANES * SUBLANES + token % SUBLANES
        ref[pl.ds(at, SUBLANES, stride=SUBLANES), :] = v

    def turned(self, ref, token) -> jax.Array:
        """[ROWS, CHANNELS] of what `store` stored."""
        tiles = ref[pl.ds(token * SUBLANES, ROWS * SUBLANES), :].reshape(ROWS // SUBLANES, SUBLANES, SUBLANES, LANES)
        return jnp.concatenate([tiles[:, j].reshape(ROWS, LANES) for j in range(SUBLANES)], 1)

    def spread(self, tokens_ref, spread_ref) -> None:
        """Every number of the tokens of a chunk over 128 lanes: [chunk / 8, columns, 8, 128], tokens on sublanes."""

        def eight(i, _):
            tokens = tokens_ref[0, pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES), :]
            for m in range(self.columns):
                spread_ref[i, m] = jnp.broadcast_to(tokens[:, m : m + 1], (SUBLANES, LANES))

        jax.lax.fori_loop(0, self.chunk // SUBLANES, eight, None, unroll=4)

    def row(self, spread_ref, eight, s, states: slice) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """B and C of some states, [states, 8, 128], and whether the state is reset, [8, 128], at token s of eight."""

        def spread(start, stop):
            numbers = spread_ref[eight, start:stop, pl.ds(s, 1), :]
            return jnp.broadcast_to(numbers, (stop - start, SUBLANES, LANES))

        B = spread(states.start, states.stop)
        C = spread(self.N + states.start, self.N + states.stop)
        return B, C, spread(2 * self.N, 2 * self.N + 1)[0] != 0 if self.resets else None


def up(size: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-size // multiple) * multiple


def blocks(v_xDxN: jax.Array) -> jax.Array:
    """[..., D, N] to [..., K, N, 8, 128], with zeros in the channels that are not there."""
    *outer, D, N = v_xDxN.shape
    v_xDxN = jnp.pad(v_xDxN, (*((0, 0),) * len(outer), (0, -D % CHANNELS), (0, 0)))
    return jnp.moveaxis(v_xDxN.reshape(*outer, -1, SUBLANES, LANES, N), -1, -3)


def channels(v_xKxNx8x128: jax.Array, D: int) -> jax.Array:
    """The inverse of `blocks`."""
    v_xKx8x128xN = jnp.moveaxis(v_xKxNx8x128, -3, -1)
    *outer, _, _, _, N = v_xKx8x128xN.shape
    return v_xKx8x128xN.reshape(*outer, -1, N)[..., :D, :]


def weights(sizes, A, B, C, D, resets):
    """Tokens (B, C and resets), A log2(e) and D, in the layout of the kernels."""
    tokens = jnp.concatenate(
        [v.astype(jnp.float32) for v in (B, C, *([resets[..., None]] if sizes.resets else []))], -1
    )
    tokens = jnp.pad(tokens, ((0, 0), (0, -sizes.T % sizes.chunk), (0, 0)))
    D = jnp.pad(D.astype(jnp.float32), (0, sizes.shape("D", 1).shape[1] - sizes.D))
    return tokens, blocks(A.astype(jnp.float32) * math.log2(math.e)), D[None]
