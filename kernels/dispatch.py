"""Choose one implementation of an op."""

import difflib
from collections.abc import Callable, Mapping

import jax


def resolve(op: str, implementation: str | None, choices: Mapping[str, Callable]) -> Callable:
    """Return the implementation of `op` called `implementation`.

    None means the best one present for `jax.default_backend()`: the backend's own entry ("tpu", "gpu") if
    `choices` has one, otherwise "xla", otherwise "reference".

    Raises:
        ValueError: `implementation` is not in `choices`; the message names the nearest one and all of them.
    """
    if implementation is None:
        implementation = next(name for name in (jax.default_backend(), "xla", "reference") if name in choices)
    if implementation not in choices:
        (nearest,) = difflib.get_close_matches(implementation, choices, n=1, cutoff=0.0)
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; did you mean {nearest!r}? "
            f"Choices here: {', '.join(choices)}"
        )
    return choices[implementation]
