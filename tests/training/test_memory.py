"""Loading a compressed run needs no more memory than the report says that the model takes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from phyla.compression.compress import compress
from phyla.compression.entropy import Huffman
from phyla.compression.recipes import parse
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.training import run
from phyla.training.checkpoints import Checkpoints
from phyla.training.compress import size
from phyla.training.config import Experiment
from phyla.training.saved import load
from phyla.training.step import split

LOAD = """
import sys
from pathlib import Path
from phyla.training.saved import load
def of_process(name):  # getrusage's would count the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
small = load(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = of_process("VmRSS")
large = load(Path(sys.argv[2]))
print(of_process("VmHWM") - before)
"""


def saved(folder: Path, recipe: str, width: int, layers: int) -> int:
    """Writes a run of an untrained model, and returns what `phyla compress` says of its bytes in memory."""
    blocks = (BlockConfig(mixer=AttentionConfig(heads=4), channel=GatedMLPConfig()),)
    experiment = Experiment(
        name="memory", model=ModelConfig(width=width, layers=layers, vocab_size=4096, pattern=blocks)
    )
    recipes = parse(recipe)
    made = compress(LanguageModel(experiment.model, nnx.Rngs(0)), recipes)[-1].model
    run.create(folder, experiment, None, compression=recipes)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_params(*split(made)[1:], coded=isinstance(recipes[-1], Huffman))
    return size(made).bytes_in_memory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["int8", "int4+huffman"])
def test_loading_needs_no_more_memory_than_the_model(recipe, tmp_path):
    """Over what it takes to load a small one."""
    saved(tmp_path / "small", recipe, 32, 2)
    stated = saved(tmp_path / "large", recipe, 512, 8)
    assert stated == sum(leaf.nbytes for leaf in jax.tree.leaves(load(tmp_path / "large").params))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.splitlines()[-1])
    print(f"{recipe}: {stated / 1e6:.1f} MB stated, {peak / 1e6:.1f} MB at the peak")
    assert 0.9 * stated < peak < 1.25 * stated
