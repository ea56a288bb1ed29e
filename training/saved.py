"""A trained model from its run directory: all that evaluation, generation and comparison need."""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from phyla.models import sizes
from phyla.models.language_model import LanguageModel
from phyla.training import run, sharding
from phyla.training.checkpoints import Checkpoints, whole_step, with_shardings
from phyla.training.config import Experiment, MeshConfig
from phyla.training.data.tokenizers import Tokenizer, check_match, load_tokenizer
from phyla.training.objectives import Objective, next_token


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A run at its last checkpoint."""

    experiment: Experiment
    tokenizer: Tokenizer
    graphdef: nnx.GraphDef
    params: nnx.State
    objective: Objective
    mesh: Mesh
    step: int

    def model(self) -> LanguageModel:
        """The model."""
        return nnx.merge(self.graphdef, self.params)


def make_objective(experiment: Experiment) -> Objective:
    """What the experiment minimises."""
    return functools.partial(next_token, chunk=experiment.loop.loss_chunk)


def load(folder: Path) -> Saved:
    """The run's last checkpoint, on the first device.

    Raises UserError if the folder is not a run, has no checkpoint yet, or has another tokenizer than it was trained
    with.
    """
    experiment = run.read_experiment(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    check_match(run.read_record(folder)["tokenizer"], tokenizer.fingerprint())
    mesh = sharding.make_mesh(MeshConfig(data=1), batch=1)
    graphdef, abstract = nnx.split(sizes.abstract(experiment.model))
    abstract = with_shardings(abstract, sharding.shardings(abstract, mesh))
    with Checkpoints(folder) as checkpoints:
        step = whole_step(checkpoints, folder)
        params = checkpoints.restore_params(step, abstract, averaged=experiment.loop.ema > 0)
    return Saved(
        experiment=experiment,
        tokenizer=tokenizer,
        graphdef=graphdef,
        params=jax.block_until_ready(params),
        objective=make_objective(experiment),
        mesh=mesh,
        step=step,
    )
