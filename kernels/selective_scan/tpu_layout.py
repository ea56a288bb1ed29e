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
END, LEAST, MOST = 3e38, 1e-35, 1e15
"""The dt of a document's first token, the least -A, and the most that dt x, B, C and dy are taken for.

Then exp(dt A) is 0, and all that it multiplies is finite: nothing is left of the document before.
"""


class Sizes(NamedTuple):
    """Tokens T, channels D, states N; channels in K blocks; tokens of a chunk and of the body of its loop."""

    T: int
    D: int
    N: int
    K: int
    chunk: int
    body: int
    pairs: bool  # whether B and C are bfloat16, and come as two halves of one number

    @classmethod
    def of(cls, x: jax.Array, B: jax.Array, C: jax.Array, chunk: int | None) -> "Sizes":
        """Blocks for this chip, the largest that fit x [B, T, D] and N of B and C. Raises `Unfit`."""
        (_, T, D), N = x.shape, B.shape[-1]
        pairs = B.dtype == C.dtype == jnp.bfloat16
        most, body = BLOCKS.get(kind(), DEFAULT)
        most = up(min(chunk or most, T), ROWS)
        body = min(body, most)
        most = up(most, body)
        while True:
            sizes = cls(T, D, N, up(D, CHANNELS) // CHANNELS, most, body, pairs)
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
        """Numbers a token that are the same for all channels: B, C and whether the state is reset."""
        return 2 * self.N + 1

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
            "A": (self.K, N, *tile),
            "D": (SUBLANES, self.K * CHANNELS),
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
            "tokens": ((1, L, self.N + 1 if self.pairs else self.columns), lambda b, c, k: (b, at(c), 0)),
            "A": ((self.K, N, *tile), lambda b, c, k: (0, 0, 0, 0)),
            "D": ((SUBLANES, CHANNELS), lambda b, c, k: (0, k)),
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
        """Every number of the tokens of a chunk over 128 lanes: [chunk / 8, columns, 8, 128], tokens on sublanes.

        What spreads a number takes one every other cycle, of however many bits: pairs take half the time.
        """

        def eight(i, _):
            tokens = tokens_ref[0, pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES), :]
            for m in range(tokens.shape[1]):
                number = jnp.broadcast_to(tokens[:, m : m + 1], (SUBLANES, LANES))
                if not self.pairs:
                    spread_ref[i, m] = number
                elif m < self.N:
                    spread_ref[i, m] = pltpu.bitcast(number << 16, jnp.float32)
                    spread_ref[i, self.N + m] = pltpu.bitcast(number & ~0xFFFF, jnp.float32)
                else:
                    spread_ref[i, 2 * self.N] = pltpu.bitcast(number, jnp.float32)

        jax.lax.fori_loop(0, self.chunk // SUBLANES, eight, None, unroll=8)

    def row(self, spread_ref, eight, s, states: slice) -> tuple[jax.Array, jax.Array]:
        """B and C of some states, [states, 8, 128], at token s of eight."""

        def spread(start, stop):
            numbers = spread_ref[eight, start:stop, pl.ds(s, 1), :]
            return jnp.broadcast_to(numbers, (stop - start, SUBLANES, LANES))

        return spread(states.start, states.stop), spread(self.N + states.start, self.N + states.stop)

    def decaying(self, dt, spread_ref, token) -> jax.Array:
        """dt [ROWS, CHANNELS], from a token of the chunk on, with `END` at resets: one selection for all states."""
        reset = spread_ref[token // SUBLANES, 2 * self.N]
        return jnp.where(jnp.concatenate([reset] * (CHANNELS // LANES), 1) != 0, END, dt)


def bounded(v: jax.Array) -> jax.Array:
    """See `MOST`."""
    return jnp.clip(v, -MOST, MOST)


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
    resets = jnp.zeros((*B.shape[:2], 1)) if resets is None else resets[..., None].astype(jnp.float32)
    B, C = bounded(B), bounded(C)
    if sizes.pairs:
        halves = jax.lax.bitcast_convert_type(jnp.stack([B, C], -1), jnp.int32)  # B is the lower half
        tokens = jnp.concatenate([halves, jax.lax.bitcast_convert_type(resets, jnp.int32)], -1)
    else:
        tokens = jnp.concatenate([B.astype(jnp.float32), C.astype(jnp.float32), resets], -1)
    tokens = jnp.pad(tokens, ((0, 0), (0, -sizes.T % sizes.chunk), (0, 0)))
    D = jnp.pad(D.astype(jnp.float32), (0, sizes.K * CHANNELS - sizes.D))
    return tokens, blocks(jnp.minimum(A.astype(jnp.float32), -LEAST) * math.log2(math.e)), jnp.tile(D, (SUBLANES, 1))
