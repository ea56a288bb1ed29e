"""A kernel whose cycles are known: `TARGET "STEPS TURNS" IMPLEMENTATION DIRECTION FOLDER`, as of bench.compile.

Each step of the grid reads one register, squares it and adds 1 TURNS times, one turn after the other, and writes it.
"""

import json
import os
import sys
from pathlib import Path

from phyla.training.bench import bundles, compile

BLOCK = (8, 128)


def main() -> None:
    """See above."""
    target, name, _, _, folder = sys.argv[1:]
    steps, turns = map(int, name.split())
    os.environ["LIBTPU_INIT_ARGS"] = bundles.flags(folder)
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    from phyla.kernels.tpu import pallas_call

    def kernel(x_ref, y_ref):
        y_ref[...] = jax.lax.fori_loop(0, turns, lambda i, x: x * x + 1, x_ref[...])

    def make():
        spec = pl.BlockSpec(BLOCK, lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct((steps * BLOCK[0], BLOCK[1]), jnp.float32)
        options = {"grid": (steps,), "in_specs": [spec], "out_specs": spec, "name": "known"}
        return lambda x: pallas_call(kernel, shape, x, **options), (shape,)

    compiled = compile.compile_for(target, make)
    result = {"compiler": compile.analysis(compiled), "kernels": ["known.1"], "warnings": []}
    Path(folder, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
