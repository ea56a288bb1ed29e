"""Choose one implementation of an op."""

import difflib
import warnings
from collections.abc import Callable, Mapping

import jax

BACKENDS = ("tpu", "gpu")
"""Implementations that are kernels for one kind of chip."""


class Unfit(ValueError):
    """Raised by a kernel, before it does anything, for an input that no block size of its chip fits; says why."""


def platform() -> str:
    """What is traced for: "tpu", "gpu" or "cpu".

    The devices of the mesh that is the context (`jax.set_mesh`), which need not be present, so that a program can be
    compiled for a chip that this machine has not; without a mesh, JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def resolve(op: str, implementation: str | None, choices: Mapping[str, Callable]) -> Callable:
    """Return the implementation of `op` called `implementation`.

    None means the best one for `platform()`: the platform's own entry ("tpu", "gpu") if `choices` has one, otherwise
    "xla", otherwise "reference". If the platform's kernel does not fit the input (it raises `Unfit`), "xla" runs, with
    a warning that says why; a kernel that was asked for by name raises.

    Raises:
        ValueError: `implementation` is not in `choices`; the message names the nearest one and all of them.
    """
    chosen = implementation
    if chosen is None:
        chosen = next(name for name in (platform(), "xla", "reference") if name in choices)
    if chosen not in choices:
        (nearest,) = difflib.get_close_matches(chosen, choices, n=1, cutoff=0.0)
        raise ValueError(
            f"{op}: unknown implementation {chosen!r}; did you mean {nearest!r}? Choices here: {', '.join(choices)}"
        )
    run = choices[chosen]
    if implementation is not None or chosen not in BACKENDS:
        return run

    def run_or_fall_back(*arguments, **options):
        try:
            return run(*arguments, **options)
        except Unfit as reason:
            warnings.warn(f"{op}: no {chosen} kernel fits, so xla runs: {reason}", stacklevel=3)
            return choices["xla"](*arguments, **options)

    return run_or_fall_back
