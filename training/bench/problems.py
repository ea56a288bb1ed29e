"""What `phyla bench kernels` measures: each op on arguments of a realistic size, and what it cannot do without.

Operations are counted once, as their fewest: a chunk of 128 tokens where the mathematics has a matrix form (64 for
wkv7), which is where the products of a token are about the fewest on a matrix unit of that size; whole squares, of
which causality needs half. Backwards, what is not among the op's arguments and results is computed again.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DIRECTIONS = ("forward", "backward")


class Size(NamedTuple):
    """B sequences of T tokens in a model of width D."""

    B: int
    T: int
    D: int
    dtype: Any
    """Of activations; gates and decays are float32."""


CHIP = Size(1, 8192, 2048, jnp.bfloat16)
CPU = Size(2, 512, 256, jnp.float32)


class Work(NamedTuple):
    """Operations of the matrix units (a product and a sum are two), of the vector units, and exponentials."""

    matrix: float = 0.0
    vector: float = 0.0
    transcendental: float = 0.0
    dtype: str = "bfloat16"
    """In which the matrix units multiply, where activations are bfloat16."""


class Problem(NamedTuple):
    """An op and its arguments, without values."""

    op: str  # its package in kernels
    call: Callable[..., Any]  # (*arguments, implementation=) -> results
    arguments: tuple[Any, ...]  # ShapeDtypeStructs, or trees of them
    differentiable: tuple[int, ...]  # which of them have a gradient
    kept: tuple[int, ...]  # which of them the gradients depend on
    work: Mapping[str, Work]  # by direction
    in_time: bool = True  # the reference goes through a sequence a token at a time

    def implementations(self) -> list[str]:
        """Those that the op has."""
        return list(importlib.import_module(f"phyla.kernels.{self.op}").IMPLEMENTATIONS)

    def function(self, implementation: str, direction: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What to compile, and the shapes of its arguments.

        Backward is without forward: it takes what that keeps, and cotangents. "both" takes cotangents and the op's
        arguments, and returns results and gradients.
        """

        def vjp(arguments):
            def of_some(*values):
                merged = list(arguments)
                for at, value in zip(self.differentiable, values, strict=True):
                    merged[at] = value
                return self.call(*merged, implementation=implementation)

            return jax.vjp(of_some, *(arguments[at] for at in self.differentiable))

        def both(cotangents, arguments):
            results, pullback = vjp(arguments)
            return results, pullback(cotangents)

        if direction == "forward":
            return functools.partial(self.call, implementation=implementation), self.arguments
        results, pullback = jax.eval_shape(vjp, self.arguments)
        if direction == "both":
            return both, (results, self.arguments)
        return lambda pullback, cotangents: pullback(cotangents), (pullback, results)

    def bytes(self, direction: str) -> int:
        """Forward: arguments and results, once. Backward: what it needs of the arguments, cotangents, gradients."""
        results = jax.eval_shape(functools.partial(self.call, implementation="reference"), *self.arguments)
        arrays = (self.arguments, results)
        if direction == "backward":
            arrays = results, [self.arguments[at] for at in (*self.kept, *self.differentiable)]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _scan(op: str, size: Size, arguments: Mapping[str, Any], forward: Work, backward: Work, **options: Any) -> Problem:
    """An op on a packed batch: every argument has a gradient but the last, the segment ids."""
    names = list(arguments)
    function = getattr(importlib.import_module(f"phyla.kernels.{op}"), op)

    def call(*values, implementation):
        *values, segment_ids = values
        return function(
            **dict(zip(names, values, strict=True)), **options, segment_ids=segment_ids, implementation=implementation
        )

    segment_ids = _array(size.B, size.T, dtype=jnp.int32)
    return Problem(
        op=op,
        call=call,
        arguments=(*arguments.values(), segment_ids),
        differentiable=tuple(range(len(names))),
        kept=tuple(range(len(names) + 1)),
        work={"forward": forward, "backward": backward},
    )


def selective_scan(size: Size) -> Problem:
    """Mamba: channels 2.5 × the width (5120 of 2048), 16 states each."""
    B, T, D, N = size.B, size.T, size.D * 5 // 2, 16
    x, bc = _array(B, T, D, dtype=size.dtype), _array(B, T, N, dtype=size.dtype)
    arguments = {"x": x, "dt": _array(B, T, D), "A": _array(D, N), "B": bc, "C": bc, "D": _array(D)}
    states = B * T * D * N
    # dt A, its exponential, (dt x) B, the update (2), C h and its sum; backwards the state again, and 15 more.
    forward, backward = Work(vector=6 * states, transcendental=states), Work(vector=19 * states, transcendental=states)
    return _scan("selective_scan", size, arguments, forward, backward)


def ssd(size: Size) -> Problem:
    """Mamba-2: heads of 64 over the width, 128 states, one group."""
    B, T, P, N, Q = size.B, size.T, 64, 128, 128
    H = size.D // P
    arguments = {
        "x": _array(B, T, H, P, dtype=size.dtype),
        "dt": _array(B, T, H),
        "A": _array(H),
        "B": _array(B, T, 1, N, dtype=size.dtype),
        "C": _array(B, T, 1, N, dtype=size.dtype),
        "D": _array(H),
    }
    shared, square, state = 2 * Q * N, 2 * H * Q * P, 2 * H * N * P
    # Forward: C Bᵀ for all heads, the decays, times x; C h; the new h. The decays are Q numbers a token and head.
    forward = Work(B * T * (shared + square + 2 * state), 2 * B * T * H * Q, B * T * H * Q)
    backward = Work(B * T * (3 * shared + 2 * square + 4 * state), 6 * B * T * H * Q, B * T * H * Q)
    return _scan("ssd", size, arguments, forward, backward)


def wkv7(size: Size) -> Problem:
    """RWKV-7: heads of 64 over the width."""
    B, T, K, Q = size.B, size.T, 64, 64
    H = size.D // K
    head = _array(B, T, H, K, dtype=size.dtype)
    arguments = {"r": head, "log_w": _array(B, T, H, K), "k": head, "v": head, "a": head, "b": head}
    # r kᵀ, r bᵀ, a kᵀ, a bᵀ; each of them times values; S a and S r, v kᵀ and its like into S.
    matrix = B * T * H * (4 * 2 * Q * K + 4 * 2 * Q * K + 4 * 2 * K * K)
    vector = B * T * H * (8 * K + 4 * Q)
    return _scan("wkv7", size, arguments, Work(matrix, vector, 2 * B * T * H * K), Work(3 * matrix, 3 * vector))


def mlstm(size: Size) -> Problem:
    """xLSTM: heads of 128 over the width, exponential input gate."""
    B, T, K, Q = size.B, size.T, 128, 128
    H = size.D // K
    head, gate = _array(B, T, H, K, dtype=size.dtype), _array(B, T, H)
    arguments = {"q": head, "k": head, "v": head, "i": gate, "f": gate}
    square, state, decays = 2 * Q * K, 2 * K * K, B * T * H * Q
    forward = Work(B * T * H * (2 * square + 2 * state), 4 * decays, decays)
    backward = Work(B * T * H * (5 * square + 4 * state), 8 * decays, decays)
    return _scan("mlstm", size, arguments, forward, backward)


def slstm(size: Size) -> Problem:
    """xLSTM: four heads over half the width, a batch of 8 with an eighth of the tokens each, but 64."""
    B, T, H = 8 * size.B, max(size.T // 8, min(size.T, 64)), 4
    P = size.D // 2 // H
    gate = _array(B, T, H, P, dtype=size.dtype)
    arguments = dict.fromkeys("ifzo", gate) | {"R": _array(4, H, P, P), "bias": _array(4, H, P)}
    cells = B * T * H * P
    forward = Work(2 * 4 * cells * P, 20 * cells, 8 * cells)
    backward = Work(3 * 2 * 4 * cells * P, 50 * cells, 8 * cells)
    return _scan("slstm", size._replace(B=B, T=T), arguments, forward, backward)


def wkv4(size: Size) -> Problem:
    """RWKV-4: the width as channels."""
    channel = _array(size.B, size.T, size.D, dtype=size.dtype)
    arguments = {"k": channel, "v": channel, "w": _array(size.D), "u": _array(size.D)}
    cells = size.B * size.T * size.D
    return _scan("wkv4", size, arguments, Work(0, 16 * cells, 5 * cells), Work(0, 40 * cells, 5 * cells))


def wkv6(size: Size) -> Problem:
    """RWKV-6: heads of 64 over the width."""
    B, T, K, Q = size.B, size.T, 64, 64
    H = size.D // K
    head = _array(B, T, H, K, dtype=size.dtype)
    arguments = {"r": head, "w": _array(B, T, H, K), "k": head, "v": head, "u": _array(H, K)}
    matrix, vector = B * T * H * (2 * 2 * Q * K + 2 * 2 * K * K), B * T * H * 6 * K
    return _scan("wkv6", size, arguments, Work(matrix, vector, 2 * B * T * H * K), Work(2.5 * matrix, 3 * vector))


def causal_conv(size: Size) -> Problem:
    """Four taps over twice the width."""
    B, T, D, W = size.B, size.T, 2 * size.D, 4
    x = _array(B, T, D, dtype=size.dtype)
    arguments = {"x": x, "weight": _array(W, D, dtype=size.dtype), "bias": _array(D, dtype=size.dtype)}
    cells = B * T * D
    return _scan("causal_conv", size, arguments, Work(0, 2 * W * cells), Work(0, 4 * W * cells))


DYNAMIC = {"dynamic": True}
FORMATS = {"int8": {}, "int8-dynamic": DYNAMIC, "int4": {}, "nf4": {}, "float8": {}, "float8-dynamic": DYNAMIC}
"""Of the weight, with what its function takes; "dynamic" rounds the activations too."""


def quantized_matmul(size: Size, form: str, M: int) -> Problem:
    """A matrix of 2 × the width to 7 × the width (4096 × 14336 of 2048), on M rows."""
    package = importlib.import_module("phyla.kernels.quantized_matmul")
    K, N = 2 * size.D, 7 * size.D
    quantize = functools.partial(getattr(package, f"quantize_{form.partition('-')[0]}"), **FORMATS[form])
    w = jax.eval_shape(quantize, _array(K, N))
    # Backwards, the cotangent is as it comes and the weight what it stands for.
    products = Work(2.0 * M * K * N)
    rounded = products._replace(dtype={"int8-dynamic": "int8", "float8-dynamic": "float8"}.get(form, "bfloat16"))
    return Problem(
        op="quantized_matmul",
        call=package.quantized_matmul,
        arguments=(_array(M, K, dtype=size.dtype), w),
        differentiable=(0,),
        kept=(1,),
        work={"forward": rounded, "backward": products},
        in_time=False,
    )


PROBLEMS: dict[str, Callable[[Size], Problem]] = {
    each.__name__: each for each in (selective_scan, ssd, wkv7, mlstm, slstm, wkv4, wkv6, causal_conv)
} | {
    f"quantized_matmul {form} × {M}": functools.partial(quantized_matmul, form=form, M=M)
    for form in FORMATS
    for M in (32, 512)
}
"""By name. Every one runs forward and backward."""
