"""Compiles one program of `phyla bench kernels` for a chip that need not be here, in a process of its own.

    python -m phyla.training.bench.compile TARGET PROBLEM IMPLEMENTATION DIRECTION FOLDER

writes FOLDER/result.json. The compiler is told only once in a process where to write what it says of a kernel (a TPU's
its bundles, a GPU's its assembler's words), hence the process.
"""

import contextlib
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phyla.training.bench import bundles


def main(arguments: Sequence[str]) -> None:
    """See above."""
    target, name, implementation, direction, folder = arguments
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["LIBTPU_INIT_ARGS"] = " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), bundles.flags(folder))).strip()
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    from phyla.training.bench.problems import CHIP, PROBLEMS

    problem = PROBLEMS[name](CHIP)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = compile_for(target, functools.partial(problem.function, implementation, direction))
    kernels = re.findall(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"", compiled.as_text())
    assembled = [assembler(path.read_text(errors="replace")) for path in sorted(Path(folder).glob("*.ptxas"))]
    unfit = [str(each.message) for each in caught if "xla runs" in str(each.message)]
    result = {"compiler": analysis(compiled), "kernels": kernels, "assembled": assembled, "warnings": unfit}
    Path(folder, "result.json").write_text(json.dumps(result))


def compile_for(target: str, make: Callable[[], tuple[Callable[..., Any], Sequence[Any]]], devices: int = 1) -> Any:
    """A function compiled for chips of one kind, its arguments whole on each of them.

    `make` gives the function and its arguments: with the chips as the context, since a pullback is traced in it.
    """
    import jax

    from phyla.training import targets

    mesh = targets.mesh(target, devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh), targets.uncached():
        function, arguments = make()
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arguments)
        return jax.jit(function).lower(*placed).compile()


def assembler(said: str) -> dict[str, Any]:
    """What NVIDIA's assembler says of a kernel: its name, registers of a thread, and bytes of them that it spills."""
    name = re.search(r"entry function '(\w+?)(_mosaic_gpu_kernel)?'", said)
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert name is not None
    assert registers is not None
    assert spilled is not None
    return {"name": name[1], "registers": int(registers[1]), "spilled": int(spilled[1])}


def analysis(compiled: Any) -> dict[str, Any]:
    """What the compiler itself says: operations, bytes and seconds (None: it does not know), and bytes of memory."""
    cost: dict[str, float] = {}
    with contextlib.suppress(NotImplementedError):
        cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()

    def known(name: str) -> float | None:
        value = cost.get(name, -1.0)
        return value if value >= 0 else None

    return {
        "flops": known("flops"),
        "bytes": known("bytes accessed"),
        "seconds": known("optimal_seconds"),
        "temporaries": None if memory is None else memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
