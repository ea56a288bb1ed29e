"""Matrices that are rounded whenever they are used, and trained as if they were not (quantization-aware training).

What is trained is the `body`; what multiplies is the matrix in few bits that compression would make of it, value for
value. The derivative by the body is the one by the rounded matrix (the straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432). Afterwards the same rounding, done once, changes nothing any more.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phyla.kernels.grouped_matmul import grouped_matmul
from phyla.kernels.quantized_matmul import Format
from phyla.kernels.quantized_matmul.codes import KINDS
from phyla.kernels.quantized_matmul.formats import blocks, nonzero, rounded_like_weights, spread
from phyla.kernels.quantized_matmul.packing import pack
from phyla.models.weights import Weight, dense_matmul


class FakeQuantized(Weight):
    """A trained matrix, rounded at every use. Where the format rounds what it multiplies, so does this."""

    def __init__(self, body: nnx.Param, rounding: Callable[[jax.Array], Format], *, transposed: bool = False):
        """Wraps a parameter.

        Args:
            body: [..., in, out].
            rounding: from one matrix [K, N]; hashable, and equal to what rounds in the same way.
            transposed: the transposed matrix is rounded, as `Quantized` holds a table.
        """
        self.body = body
        self.rounding = rounding
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight.shape`."""
        return self.body.shape

    def held(self) -> Format:
        """The matrix in few bits, as it is now; of a stack, all of them."""
        return self._of_each(self.rounding, jax.lax.stop_gradient(self._inputs_first()))

    def _differentiable(self, held: Format) -> jax.Array:
        """The values of `held` [..., K, N], differentiable."""
        return instead(self._inputs_first(), self._of_each(lambda held: held.materialize(), held))

    def _inputs_first(self) -> jax.Array:
        return self.body[...].swapaxes(-1, -2) if self.transposed else self.body[...]

    def _of_each(self, one: Callable[..., Any], *stacks: Any) -> Any:
        for _ in self.shape[:-2]:
            one = jax.vmap(one)
        return one(*stacks)

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `Weight.matmul`."""
        return self._multiply(dense_matmul, x)

    def grouped_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `Weight.grouped_matmul`."""
        return self._multiply(functools.partial(grouped_matmul, sizes=sizes), x)

    def _multiply(self, multiply: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        held = self.held()
        rounded = rounded_like_weights(jax.lax.stop_gradient(x), held).astype(x.dtype)
        dense = self._differentiable(held)
        return multiply(instead(x, rounded), dense.swapaxes(-1, -2) if self.transposed else dense)

    def materialize(self) -> jax.Array:
        """See `Weight.materialize`."""
        dense = self._differentiable(self.held())
        return dense.swapaxes(-1, -2) if self.transposed else dense


class LearnedSteps(FakeQuantized):
    """Integers times steps that are trained with them (LSQ, Esser et al. 2020, arXiv 1902.08153).

    v = clip(⌊w / s⌉, -2^(bits-1), 2^(bits-1) - 1) s. Within the range the derivative by w is 1 and the one by s is
    ⌊w / s⌉ - w / s (equation 3); outside they are 0 and the outermost code. The one by s is multiplied by
    1 / √(n · most), n the weights that share s and most the largest code (section 2.2).
    """

    def __init__(self, body: nnx.Param, step: nnx.Param, *, bits: int, group: int, transposed: bool = False):
        """Wraps a parameter.

        Args:
            body: [..., in, out].
            step: [..., ceil(K / group), N], or [...] if all of a matrix share it; see `first_steps`.
            bits: of a code: 2, 3, 4 or 8.
            group: inputs that share a step.
            transposed: as in `FakeQuantized`.
        """
        self.body = body
        self.step = step
        self.bits = bits
        self.group = group
        self.transposed = transposed

    def held(self) -> Format:
        """See `FakeQuantized.held`."""
        w, step = map(jax.lax.stop_gradient, (self._inputs_first(), self._step()))
        return self._of_each(self._held, w, step)

    def _step(self) -> jax.Array:
        return jnp.maximum(self.step[...], 1e-8)

    def _held(self, w: jax.Array, step: jax.Array) -> Format:
        K, N = w.shape
        least, most = _range(self.bits)
        codes = jnp.clip(jnp.round(w / _spread(step, self.group, K, N)), least, most).astype(jnp.int8)
        return KINDS[self.bits](codes=pack(codes, self.bits), scale=step, rows=K, group=self.group)

    def _differentiable(self, held: Format) -> jax.Array:
        *stack, K, N = held.shape
        least, most = _range(self.bits)
        shared = K * N if self.step.ndim == len(stack) else min(self.group, K)
        factor = 1 / math.sqrt(shared * most)

        def one(w: jax.Array, step: jax.Array) -> jax.Array:
            return learned_rounding(w, _spread(step, self.group, K, N), least, most, factor)

        return self._of_each(one, self._inputs_first(), self._step())


def first_steps(w: jax.Array, bits: int, group: int | None) -> jax.Array:
    """LSQ's first steps for w [K, N]: 2 ⟨|w|⟩ / √most, float32 [ceil(K / group), N], or [] for a group of None."""
    mean = jnp.mean(jnp.abs(w))
    if group is not None:
        rows = jnp.clip(len(w) - group * jnp.arange(-(-len(w) // group)), 1, group)
        mean = jnp.sum(jnp.abs(blocks(w, group)), axis=1) / rows[:, None]
    return nonzero(2 * mean / math.sqrt(_range(bits)[1]))


def _range(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _spread(step: jax.Array, group: int, K: int, N: int) -> jax.Array:
    return spread(jnp.broadcast_to(step, (-(-K // group), N)), group, K)


@jax.custom_vjp
def instead(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, exactly, with the derivative 1 by x and 0 by itself."""
    return rounded


instead.defvjp(lambda x, rounded: (rounded, None), lambda _, g: (g, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def learned_rounding(w: jax.Array, s: jax.Array, least: int, most: int, factor: float) -> jax.Array:
    """clip(⌊w / s⌉, least, most) s, element by element; the derivative by s is multiplied by `factor`."""
    return jnp.clip(jnp.round(w / s), least, most) * s


def _forward(w, s, least, most, factor):
    return learned_rounding(w, s, least, most, factor), (w, s)


def _backward(least, most, factor, kept, g):
    w, s = kept
    v = w / s
    inside = (v >= least) & (v <= most)
    by_step = jnp.where(inside, jnp.round(v) - v, jnp.clip(v, least, most))
    return jnp.where(inside, g, 0.0), factor * g * by_step


learned_rounding.defvjp(_forward, _backward)
