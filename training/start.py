"""What training starts from: a new model, or that of another run; with recipes applied to it; and its teacher."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from phyla.compression.adapters import targets
from phyla.compression.compress import abstract
from phyla.compression.entropy import Huffman
from phyla.compression.matrices import kind_of_layer
from phyla.compression.prune import Prune
from phyla.compression.recipes import parse
from phyla.compression.rule import Rule
from phyla.models import sizes
from phyla.models.adapted import Adapter
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.training.config import Experiment, OptimizerConfig
from phyla.training.data.tokenizers import Tokenizer, make_tokenizer
from phyla.training.optimizer import state_bytes
from phyla.training.saved import Saved, load, prepared
from phyla.training.step import split
from phyla.training.transfer import initialise_from, summary


class Start(NamedTuple):
    """A model that is not made yet."""

    experiment: Experiment
    base: Saved | None
    own: tuple[Rule, ...]
    """What is done to it before it is trained."""
    teacher: Saved | None
    """What is distilled into it; without its arrays if its lessons are kept (`distillation.cache`)."""

    @property
    def recipes(self) -> tuple[Rule, ...]:
        """All that was done to it, in the base already or here."""
        return (*(() if self.base is None else self.base.recipes), *self.own)

    @property
    def derived(self) -> bool:
        """Whether what is frozen of it is in the base, and need not be saved again."""
        return self.base is not None and all(rule.keeps_base for rule in self.own)

    def tokenizer(self) -> Tokenizer:
        """The base's, the teacher's, or one for the data. Raises UserError if it is not the teacher's."""
        data, teacher = self.experiment.data, self.teacher
        if self.base is not None:
            found = self.base.tokenizer
        elif teacher is not None and data.tokenizer == teacher.experiment.data.tokenizer:
            return teacher.tokenizer
        else:
            found = make_tokenizer(data)
        if teacher is not None and found.fingerprint() != teacher.tokenizer.fingerprint():
            known = teacher.tokenizer.fingerprint()
            raise UserError(
                f"the student's tokenizer is not that of its teacher {teacher.folder}: {found.fingerprint()['kind']} "
                f"with {found.vocab_size} ids, not {known['kind']} with {known['vocab_size']}, or of another text"
            )
        return found

    @property
    def pruned(self) -> bool:
        """Whether zeros of it are no accident."""
        before = self.base is not None and self.base.experiment.sparsity.makes_zeros
        return before or any(isinstance(rule, Prune) for rule in self.recipes)

    def abstract(self) -> LanguageModel:
        """With shapes in place of arrays."""
        return abstract(self.experiment.model, self.recipes)

    def make(
        self, params: nnx.State, frozen: nnx.State, note: Callable[[str], None] = print
    ) -> tuple[nnx.State, nnx.State]:
        """What is trained of it, and what is frozen, laid out as the given shardings say.

        `note` is told what was copied from the teacher, if that was asked for.
        """
        config, seed = self.experiment.model, self.experiment.loop.seed

        def new() -> LanguageModel:
            return LanguageModel(config, nnx.Rngs(seed))

        if self.base is not None:
            model = self.base.model()
        elif self.teacher is not None and self.experiment.distillation.copy:
            graphdef = nnx.split(abstract(config, ()))[0]
            student = nnx.merge(graphdef, jax.jit(lambda: nnx.split(new())[1])())
            teacher = self.teacher if self.experiment.distillation.cache is None else load(self.teacher.folder)
            model, copied, left = initialise_from(student, teacher.model())
            note(summary(copied, left))
        else:
            return jax.jit(lambda: split(prepared(new(), self.experiment))[1:], out_shardings=(params, frozen))()
        return jax.device_put(split(prepared(model, self.experiment))[1:], (params, frozen))


def what_is_trained(model: LanguageModel, optimizer: OptimizerConfig) -> str:
    """How many parameters are trained if not all are, and the bytes that the optimizer keeps for them.

    With adapters, for each kind of layer how much of it has one: the share of its matrices' numbers.
    """
    _, params, frozen = split(model)
    if not frozen:
        return ""
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    said = f"trains {trained:,} numbers beside {sizes.count(model.config):,}"
    dense = split(sizes.abstract(model.config))[1]
    kept, of_all = (state_bytes(optimizer, each) for each in (params, dense))
    said += f"; {optimizer.name} keeps {kept:,} bytes for them (for all: {of_all:,})"
    shares: dict[str, list[int]] = {}
    for target in targets(model):
        size = math.prod(target.held.shape)
        row = shares.setdefault(kind_of_layer(model.config, target.path), [0, 0])
        row[0] += size * isinstance(target.held, Adapter)
        row[1] += size
    if any(covered for covered, _ in shares.values()):
        said += "; has an adapter on " + ", ".join(f"{100 * a / b:.3g} % of {kind}" for kind, (a, b) in shares.items())
    return said


def start(experiment: Experiment) -> Start:
    """Of an experiment.

    Raises UserError if the base is not a run or has another model, or a recipe cannot be applied before training.
    """
    own = parse(experiment.recipes) if experiment.recipes else ()
    for rule in own:
        if isinstance(rule, Huffman):
            raise UserError(f"{rule} is how a run is written by phyla compress: leave it out")
        if rule.needs_text or rule.reshapes:
            why = "reads text" if rule.needs_text else "makes another model"
            raise UserError(f"{rule} {why}: make a run of it first, with phyla compress, and train on from that")
    adapters = [rule for rule in own if rule.keeps_base]
    if len(adapters) > 1:
        raise UserError(
            f"{adapters[-1]} would freeze what {adapters[0]} learns: train one, then the other from its run"
        )
    kept = experiment.distillation.cache is not None
    teacher = None if experiment.teacher is None else load(Path(experiment.teacher), arrays=not kept)
    if teacher is not None and experiment.model.vocab_size is None:
        vocab_size = teacher.model().config.vocab_size
        model = dataclasses.replace(experiment.model, vocab_size=vocab_size)
        experiment = dataclasses.replace(experiment, model=model)
    if experiment.base is None:
        return Start(experiment, None, own, teacher)
    base = load(Path(experiment.base))
    if base.experiment.model != experiment.model:
        raise UserError(f"{experiment.base} has another model than this experiment")
    return Start(experiment, base, own, teacher)
