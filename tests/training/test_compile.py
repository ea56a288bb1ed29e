"""What runs on TPUs compiles for them with their own compiler: every kernel, and whole training steps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from phyla import configs
from phyla.models import sizes
from phyla.models.language_model import LanguageModel
from phyla.training import sharding, targets
from phyla.training.bench.compile import compile_for
from phyla.training.bench.problems import CHIP, DIRECTIONS, PROBLEMS
from phyla.training.config import Experiment
from phyla.training.optimizer import make_optimizer
from phyla.training.saved import make_objective
from phyla.training.step import NOTHING, compile_step, initial_state, make_step

KERNELS = [name for name in PROBLEMS if "tpu" in PROBLEMS[name](CHIP).implementations()]
QUICK = {
    "selective_scan",
    "ssd",
    "wkv7",
    "mlstm",
    "slstm",
    "quantized_matmul nf4 × 32",
    "quantized_matmul int8-dynamic × 512",
}
"""What `make test` compiles, for a v5e; the rest is for `make test-all`."""


def _each():
    for target in targets.CHIPS:
        for name in KERNELS:
            for direction in DIRECTIONS:
                marks = () if target == "v5e" and name in QUICK else pytest.mark.slow
                yield pytest.param(target, name, direction, marks=marks)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("target", "name", "direction"), list(_each()))
def test_a_kernel_compiles(target, name, direction):
    problem = PROBLEMS[name](CHIP)
    compiled = compile_for(target, functools.partial(problem.function, "tpu", direction))
    assert "tpu_custom_call" in compiled.as_text()


def lower_step(experiment: Experiment, mesh: Mesh):
    """A training step of an experiment, compiled for a mesh without any array."""
    graphdef, params = nnx.split(sizes.abstract(experiment.model))
    optimizer = make_optimizer(experiment.optimizer, experiment.loop.steps, (params, NOTHING))

    def init():
        return initial_state(nnx.state(LanguageModel(experiment.model, nnx.Rngs(0))), optimizer, experiment.loop)

    state = jax.eval_shape(init)
    layout = sharding.shardings(state, mesh)
    placed = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, layout)
    row = np.zeros((1, experiment.data.sequence_length + 1), np.int32)
    batch = sharding.abstract_batch(experiment.loop.batch_size, {"tokens": row, "segment_ids": row}, mesh)
    step = make_step(graphdef, make_objective(experiment, mask_id=0), optimizer, experiment.loop)
    return compile_step(step, placed, batch, layout, mesh)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "name", [name if name == "xlstm" else pytest.param(name, marks=pytest.mark.slow) for name in configs.SMALL]
)
def test_a_training_step_compiles_for_four_chips(name):
    """Data and tensor parallel at once: every device runs the kernels on its rows and its channels."""
    experiment = configs.experiment(name)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=257))
    devices = targets.mesh("v5e", 4).devices.reshape(2, 1, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=targets.mesh("v5e").axis_types * 3)
    with targets.uncached():
        text = lower_step(experiment, mesh).as_text() or ""
    assert ("tpu_custom_call" in text) == (name != "transformer")


def test_programs_for_other_chips_are_not_cached(tmp_path):
    """Also where the cache was in use before, and it is again afterwards."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def use(folder, seconds):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compilation_cache.reset_cache()

    def cached():
        return len([path for path in tmp_path.iterdir() if path.name.endswith("-cache")])

    use(str(tmp_path), 0)
    try:
        jax.jit(lambda x: x + 1)(np.ones(3))
        after_one = cached()
        assert after_one
        compile_for("v5e", lambda: (lambda x: x + 2, [jax.ShapeDtypeStruct((8, 128), np.float32)]))
        assert cached() == after_one
        jax.jit(lambda x: x + 3)(np.ones(3))
        assert cached() > after_one
    finally:
        use(*before)
