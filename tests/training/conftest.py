"""A text small enough to train on in seconds, and an experiment on it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import MLPConfig
from phyla.training.config import Experiment, LoopConfig, MeshConfig, OptimizerConfig
from phyla.training.data.config import DataConfig
from phyla.training.loop import train
from phyla.training.optimizer import make_optimizer
from phyla.training.saved import make_objective
from phyla.training.step import NOTHING, initial_state, make_step

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A hybrid of both mixers that trains in seconds, on one device."""
    return _experiment(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of it, which is only read."""
    folder = tmp_path_factory.mktemp("trained")
    train(_experiment(folder), folder / "run")
    return folder / "run"


def _experiment(folder: Path) -> Experiment:
    (folder / "train.txt").write_text(TEXT)
    (folder / "validation.txt").write_text(TEXT[:300])
    pattern = (
        BlockConfig(mixer=AttentionConfig(heads=2), channel=MLPConfig()),
        BlockConfig(mixer=MambaConfig(state=4)),
    )
    return Experiment(
        name="tiny",
        model=ModelConfig(width=16, layers=2, pattern=pattern),
        data=DataConfig(
            source=str(folder / "train.txt"), validation=str(folder / "validation.txt"), sequence_length=16
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        loop=LoopConfig(steps=40, batch_size=8, eval_every=10, checkpoint_every=10, log_every=1, eval_tokens=None),
        mesh=MeshConfig(data=1),
    )


@pytest.fixture
def setup():
    """A function: the compiled step, the state before it, the graph and the experiment."""
    return _setup


def _setup(experiment: Experiment, **loop) -> tuple:
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, vocab_size=31),
        loop=dataclasses.replace(experiment.loop, **loop),
    )
    graphdef, params = nnx.split(LanguageModel(experiment.model, nnx.Rngs(0)))
    optimizer = make_optimizer(experiment.optimizer, experiment.loop.steps, (params, NOTHING))
    step = make_step(graphdef, make_objective(experiment, mask_id=30), optimizer, experiment.loop)
    return jax.jit(step), initial_state(params, optimizer, experiment.loop), graphdef, experiment


@pytest.fixture
def batch() -> dict[str, jax.Array]:
    """Rows of very different weight: the mean of the microbatches' means would be wrong."""
    rows, length = 8, 9
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, 31)
    real = jnp.arange(length)[None] < jnp.asarray([2, 9, 3, 9, 9, 2, 4, 9])[:rows, None]
    return {"tokens": tokens, "segment_ids": real.astype(jnp.int32)}
