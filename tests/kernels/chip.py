"""Programs compiled for a chip that is not here."""

from collections.abc import Callable
from typing import Any

from phyla.training.bench.compile import compile_for


def temporaries(function: Callable[..., Any], *arguments: Any, target: str = "v5e") -> int:
    """Bytes that a function compiled for one chip needs beside arguments and results (ShapeDtypeStructs, or trees)."""
    analysis = compile_for(target, lambda: (function, arguments)).memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes
