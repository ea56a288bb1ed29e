"""What loading a compressed run takes in memory is what the report says of the model."""

import os
import subprocess
import sys
from pathlib import Path

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
from phyla.training.compress import Size, size
from phyla.training.config import Experiment
from phyla.training.step import split

LOAD = """
import sys
from pathlib import Path
from phyla.training.saved import load
def of_process(name):  # getrusage's would count the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
for _ in range(2):  # the first time code is loaded too
    small = load(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = of_process("VmRSS")
large = load(Path(sys.argv[2]))
print(of_process("VmRSS") - before, of_process("VmHWM") - before)
"""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "100000"}
"""For glibc: what is freed is no longer counted."""


def saved(folder: Path, recipe: str, width: int, layers: int) -> Size:
    """Writes a run of an untrained model, and returns what `phyla compress` says of its size."""
    blocks = (BlockConfig(mixer=AttentionConfig(heads=4), channel=GatedMLPConfig()),)
    experiment = Experiment(
        name="memory", model=ModelConfig(width=width, layers=layers, vocab_size=4096, pattern=blocks)
    )
    recipes = parse(recipe)
    made = compress(LanguageModel(experiment.model, nnx.Rngs(0)), recipes)[-1].model
    run.create(folder, experiment, None, compression=recipes)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_params(*split(made)[1:], coded=isinstance(recipes[-1], Huffman))
    return size(made)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["int8", "int4+huffman"])
def test_loading_takes_what_the_report_says(recipe, tmp_path):
    """What stays is the model; at the peak its largest array, here a fifth of it, is there twice."""
    saved(tmp_path / "small", recipe, 32, 2)
    stated = saved(tmp_path / "large", recipe, 512, 12)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | GIVEN_BACK
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stays, peak = map(int, done.stdout.split()[-2:])
    figures = (stated.bytes_in_memory, stays, stated.bytes_to_load, peak)
    print(recipe, "MB stated {:.1f}, stay {:.1f}; to load {:.1f}, peak {:.1f}".format(*(x / 1e6 for x in figures)))
    assert 0.95 * stated.bytes_in_memory < stays < 1.15 * stated.bytes_in_memory
    assert peak - stays < 1.4 * (stated.bytes_to_load - stated.bytes_in_memory)
