"""A trained model from its run directory: all that evaluation, generation and comparison need."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from phyla.compression import compress
from phyla.compression.recipes import parse
from phyla.compression.rule import Rule
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.serialization import to_json
from phyla.training import run, sharding
from phyla.training.checkpoints import Checkpoints, whole_step, with_shardings
from phyla.training.config import Experiment, MeshConfig
from phyla.training.data.tokenizers import Tokenizer, check_match, load_tokenizer
from phyla.training.objectives import Asker, Objective, hidden_tokens, masked_token, next_token, next_tokens
from phyla.training.step import split


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A run at its last checkpoint."""

    folder: Path
    experiment: Experiment
    own_tokenizer: Tokenizer | None
    """None: a model that was imported without one."""
    graphdef: nnx.GraphDef
    params: nnx.State
    mesh: Mesh
    step: int
    recipes: tuple[Rule, ...] = ()
    """All that was done to its model besides training."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the run has none."""
        if self.own_tokenizer is None:
            raise UserError(f"{self.folder} has no tokenizer: the model was imported from a source without one")
        return self.own_tokenizer

    @property
    def objective(self) -> Objective:
        """What it was trained for. Raises UserError if the run has no tokenizer."""
        return make_objective(self.experiment, self.tokenizer.mask_id)

    def model(self) -> LanguageModel:
        """The model."""
        return nnx.merge(self.graphdef, self.params)


def make_asker(experiment: Experiment, mask_id: int) -> Asker:
    """What the objective asks; the mask is the tokenizer's, for the masked-token objective."""
    if experiment.objective == "next-token":
        return next_tokens
    vocab_size = experiment.model.vocab_size
    assert vocab_size is not None
    return functools.partial(hidden_tokens, vocab_size=vocab_size, mask_id=mask_id)


def make_objective(experiment: Experiment, mask_id: int) -> Objective:
    """What the experiment minimises; the mask is the tokenizer's, for the masked-token objective."""
    if experiment.objective == "next-token":
        return functools.partial(next_token, chunk=experiment.loop.loss_chunk)
    return functools.partial(masked_token, chunk=experiment.loop.loss_chunk, mask_id=mask_id)


def load(folder: Path, *, arrays: bool = True) -> Saved:
    """The run's last checkpoint, on the first device; without `arrays` only their shapes, and nothing is read.

    Raises UserError if the folder is not a run, has no checkpoint yet, or has another tokenizer than it was trained
    with.
    """
    experiment = run.read_experiment(folder)
    fingerprint = run.read_record(folder)["tokenizer"]
    tokenizer = None
    if fingerprint is not None:
        tokenizer = load_tokenizer(folder / "tokenizer")
        check_match(fingerprint, tokenizer.fingerprint())
    mesh = sharding.make_mesh(MeshConfig(data=1), batch=1)
    recipes = run.read_recipes(folder)
    model = compress.abstract(experiment.model, compress.shaping(recipes))
    graphdef, *abstract = split(model)
    params, frozen = (with_shardings(each, sharding.shardings(each, mesh)) for each in abstract)
    with Checkpoints(folder) as checkpoints:
        step = whole_step(checkpoints, folder)
        if arrays:
            item = "ema" if checkpoints.has(step, "ema") else "params"
            params = checkpoints.restore_params(step, params, item)
            if checkpoints.has(step, "frozen"):
                frozen = checkpoints.restore_params(step, frozen, "frozen")
            elif frozen:
                frozen = _frozen_of_base(experiment)
        params = nnx.merge_state(params, frozen)
    return Saved(
        folder=folder,
        experiment=experiment,
        own_tokenizer=tokenizer,
        graphdef=graphdef,
        params=jax.block_until_ready(params) if arrays else params,
        mesh=mesh,
        step=step,
        recipes=recipes,
    )


def fingerprint(saved: Saved) -> str:
    """Of the model: equal only if its configuration, its recipes and the files of its weights are equal."""
    known = {"model": to_json(saved.experiment.model), "recipes": list(map(str, saved.recipes))}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    with Checkpoints(saved.folder) as checkpoints:
        item = "ema" if checkpoints.has(saved.step, "ema") else "params"
        whole = checkpoints.has(saved.step, "frozen")
        for path in checkpoints.files(saved.step, (item, "frozen")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    if saved.experiment.base is not None and not whole and split(saved.model())[2]:
        digest.update(fingerprint(load(Path(saved.experiment.base), arrays=False)).encode())
    return digest.hexdigest()


def prepared(model: LanguageModel, experiment: Experiment) -> LanguageModel:
    """The model with the experiment's recipes applied to it, as it is when its training begins."""
    own = parse(experiment.recipes) if experiment.recipes else ()
    return compress.compress(model, own, seed=experiment.loop.seed)[-1].model if own else model


def _frozen_of_base(experiment: Experiment) -> nnx.State:
    """What a run did not train, and has not saved, because the run that it began with has it."""
    assert experiment.base is not None
    return split(prepared(load(Path(experiment.base)).model(), experiment))[2]
