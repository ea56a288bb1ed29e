"""Weights that share a few values: a number for each, and the table of the values."""

import dataclasses

import jax
import jax.numpy as jnp

from phyla.kernels.quantized_matmul.formats import STATIC, Format
from phyla.kernels.quantized_matmul.packing import packed_rows, unpack

SELECT = 4
"""Bits up to which a value is found by selection, which is faster than a table on a CPU."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook(Format):
    """book[code], with one book for the matrix. Several codes to a byte, as `packing` says."""

    codes: jax.Array  # uint8 [packed_rows(K), N]
    book: jax.Array  # float32 [2^bits]
    rows: int = dataclasses.field(metadata=STATIC)  # K

    @property
    def bits(self) -> int:
        """Of a code."""
        return (self.book.shape[-1] - 1).bit_length()

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., K, N)."""
        return *self.codes.shape[:-2], self.rows, self.codes.shape[-1]

    def materialize(self) -> jax.Array:
        """Float32 [K, N]."""
        return self._values(self.codes, self.rows)

    def cut(self, start: jax.Array, rows: int) -> jax.Array:
        """Some rows, float32 [rows, N], from a `start` that is a multiple of 8."""
        packed = jax.lax.dynamic_slice_in_dim(self.codes, start * self.bits // 8, packed_rows(rows, self.bits))
        return self._values(packed, rows)

    def take_columns(self, columns: jax.Array) -> jax.Array:
        """See `Format.take_columns`."""
        return self._values(jnp.take(self.codes, columns, axis=-1), self.rows)

    def _values(self, packed: jax.Array, rows: int) -> jax.Array:
        codes = unpack(packed, self.bits)[:rows]
        if self.bits > SELECT:
            return jnp.take(self.book, codes, mode="clip")
        values = list(self.book)
        for bit in range(self.bits):
            odd = (codes >> bit & 1) != 0
            values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]
