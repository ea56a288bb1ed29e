"""What the shared suite knows about each op: one file an op, which defines `OP`."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple


class Op(NamedTuple):
    """An op and an independent description of it. B, T: batch and time."""

    call: Callable
    # numpy, one row, one segment, (state, **arguments) -> (y, state); also in complex128,
    # for complex steps differentiate it: compare real parts only, and no np.abs
    document: Callable
    draw: Callable  # (rng, B, T, wide) -> arguments in float64; wide: over six decades
    draw_state: Callable  # (rng, B) -> a state that can occur, an array or a tuple of arrays [B, ...]; zeros: empty
    by_token: frozenset[str]  # arguments with the axes batch and time in front
    output_shape: tuple[int, ...]  # of one token
    loud: frozenset[str]  # arguments by token that may be as large as float32 goes
    fast: tuple[str, ...] = ("xla",)  # implementations beside the reference
    tolerance: float = 2e-6  # of float32: norm of the error over the norm
    wide_tolerance: float = 2e-5  # with arguments over six decades


OPS: dict[str, Any] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").OP for module in pkgutil.iter_modules(__path__)
}
