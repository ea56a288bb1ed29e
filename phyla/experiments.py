"""The commands that train: their options are the fields of an experiment."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

from tyro.conf import arg

from phyla import configs
from phyla.arguments import parse
from phyla.cores import sequences, use_all_cores
from phyla.models.errors import UserError, choose

if TYPE_CHECKING:
    from phyla.training.config import Experiment

TRAIN_HELP = """\
usage: phyla train NAME [OPTIONS]

Trains one experiment. Every field of it is an option: `phyla train NAME --help` lists them with their values.

experiments:
{experiments}

examples:
  phyla train transformer
  phyla train mamba --optimizer.learning-rate 1e-3 --model.layers 6
  phyla train transformer --model.pattern.0.mixer.heads 8 --max-steps 100 --out runs/eight-heads
"""


def train(arguments: Sequence[str]) -> None:
    """`phyla train NAME`: a run directory under runs/, or where --out says. Trains on if it exists."""
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            print(TRAIN_HELP.format(experiments=_experiments()), end="")
            return
        names = ", ".join(configs.EXPERIMENTS)
        raise UserError(f"name an experiment first: {names} (as in `phyla train transformer`)")
    _run(train_arguments(arguments))


def train_arguments(arguments: Sequence[str]) -> "Training":
    """The named experiment with the fields that the arguments change, the folder and the bound on the steps."""
    name, *rest = arguments
    experiment = configs.experiment(name)
    # Its sections and the command's own options side by side; the name is what was asked for.
    apart = "name", "base", "teacher", "distillation"
    sections = [each.name for each in fields(experiment) if each.name not in apart]
    description = f"{_summary(name)}\n\nTrains it, or goes on if it was interrupted. Its fields and their values:"
    return _training(experiment, sections, rest, f"phyla train {name}", description)


FINETUNE_HELP = """\
usage: phyla finetune RUN [RECIPE] [OPTIONS]

Trains on from a run: all of its model, or only what a recipe adds to it. The new run keeps RUN's configuration but for
the options that are given; `phyla finetune RUN --help` lists them. What a recipe froze stays in RUN and is not saved
again.

examples:
  phyla finetune runs/RUN --data.source "letters/*.txt" --optimizer.learning-rate 3e-4 --loop.steps 200
  phyla finetune runs/RUN-int8 --data.source "letters/*.txt" --out runs/letters

What a recipe such as magnitude-2:4 set to zero, in RUN or here, stays exactly zero (--no-sparsity.hold trains it). So
pruning, retraining and rounding are a chain of runs, each of which goes on where it was interrupted:
  phyla finetune runs/RUN magnitude-2:4 --out runs/sparse
  phyla finetune runs/sparse qat-int4 --out runs/sparse-qat
  phyla compress runs/sparse-qat int4 --out runs/small
"""


def finetune(arguments: Sequence[str]) -> None:
    """`phyla finetune RUN [RECIPE]`: a new run that begins with RUN's model."""
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            print(FINETUNE_HELP, end="")
            return
        raise UserError("name a run first (as in `phyla finetune runs/RUN`)")
    _run(finetune_arguments(arguments))


def finetune_arguments(arguments: Sequence[str]) -> "Training":
    """What to train: the run's experiment, based on the run, with the recipe and the fields that the arguments give."""
    from phyla.training import run

    folder, *rest = arguments
    recipes = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    before = run.read_experiment(Path(folder))
    base = str(Path(folder))
    experiment = replace(before, name=f"{before.name}-finetuned", base=base, recipes=recipes, teacher=None)
    description = f"Trains on from {folder}. The fields of its experiment that can be changed, and their values:"
    return _training(
        experiment, ["data", "optimizer", "sparsity", "loop", "mesh"], rest, f"phyla finetune {folder}", description
    )


DISTILL_HELP = """\
usage: phyla distill TEACHER STUDENT [--recipe NAME] [OPTIONS]

Trains a student to say what a teacher says. TEACHER is a run; STUDENT is an experiment, of which a new model is made,
or a run, which is trained on. The student reads the teacher's text, unless the options say another, and has its
tokenizer. The new run needs the teacher only to be trained. `phyla distill TEACHER STUDENT --help` lists every option.

recipes:
{recipes}

A recipe of stages is a chain of runs, OUT-STAGE and at last OUT; the same command goes on where it was interrupted.
--stage-steps 80,160,2760 says how many steps each has, in place of --loop.steps.

With --distillation.top-k K --distillation.cache FOLDER the teacher's likeliest tokens are written to FOLDER once, for
every row of the text, and any number of students train on them without the teacher in memory.

examples:
  phyla distill runs/TEACHER mamba
  phyla distill runs/TEACHER transformer --recipe distilbert --model.layers 2
  phyla distill runs/TEACHER runs/STUDENT --distillation.divergence reverse-kl --out runs/STUDENT-distilled
  phyla distill runs/TEACHER mamba --distillation.top-k 16 --distillation.cache runs/TEACHER-top16
"""


def distill(arguments: Sequence[str]) -> None:
    """`phyla distill TEACHER STUDENT`: a new run."""
    if len(arguments) < 2 or any(each.startswith("-") for each in arguments[:2]):
        if {"-h", "--help"} & set(arguments):
            print(DISTILL_HELP.format(recipes=_distillations()), end="")
            return
        raise UserError("name a teacher and a student first (as in `phyla distill runs/TEACHER mamba`)")
    from phyla.training import run
    from phyla.training.config import STAGES

    teacher, student, *rest = arguments
    recipe, rest = _taken("--recipe", rest, "logits")
    stages = STAGES.get(recipe, (recipe,))
    steps, rest = _taken("--stage-steps", rest, "")
    of_stages = [["--loop.steps", count] for count in steps.split(",")] if steps else [[]] * len(stages)
    if len(of_stages) != len(stages):
        raise UserError(f"--stage-steps {steps} must be as many numbers as {recipe} has stages, {len(stages)}")
    for stage, steps_of_stage in zip(stages, of_stages, strict=True):
        asked = distill_arguments([teacher, student, "--recipe", stage, *rest, *steps_of_stage])
        if stage != stages[-1] and asked.out is not None:
            asked = asked._replace(out=asked.out.with_name(f"{asked.out.name}-{stage}"))
        if not _run(asked):
            return
        student = str(asked.out or run.default_folder(asked.experiment))
        # What the first stage made is the model from then on.
        rest = _without("--model.", rest)


def distill_arguments(arguments: Sequence[str]) -> "Training":
    """The student's experiment, with the teacher's text, the recipe, and the fields that the arguments give."""
    from phyla.training import run
    from phyla.training.config import DISTILLATIONS, MIXERS_ALONE, OF_MIXERS, STAGES

    teacher, student, *rest = arguments
    recipe, rest = _taken("--recipe", rest, "logits")
    choose("recipe", recipe, (*DISTILLATIONS, *STAGES))
    distillation = DISTILLATIONS[STAGES[recipe][0] if recipe in STAGES else recipe]
    teachers = run.read_experiment(Path(teacher))
    sections = ["distillation", "data", "optimizer", "loop", "mesh"]
    recipes = MIXERS_ALONE if recipe in OF_MIXERS else ""
    if (Path(student) / "config.json").exists():
        before = run.read_experiment(Path(student))
        # What a stage before this one froze stays so, or not.
        is_frozen = (run.read_record(Path(student))["compression"] or "").endswith(MIXERS_ALONE)
        recipes = ("" if recipes else "thaw") if is_frozen else recipes
        before = replace(before, base=str(Path(student)))
    else:
        before = configs.experiment(student)
        sections.insert(0, "model")
    experiment = replace(
        before,
        name=before.name if before.teacher == str(Path(teacher)) else f"{before.name}-of-{teachers.name}",
        teacher=str(Path(teacher)),
        data=teachers.data,
        objective=teachers.objective,
        recipes=recipes,
        distillation=distillation,
    )
    description = f"Distils {teacher} into {student} by the recipe {recipe}. The fields that can be changed:"
    return _training(experiment, sections, rest, f"phyla distill {teacher} {student}", description)


def _taken(option: str, arguments: Sequence[str], otherwise: str) -> tuple[str, list[str]]:
    """The last value of an option that decides what the others are, and the arguments without it."""
    value, rest, left = otherwise, [], list(arguments)
    while left:
        name, equals, given = left.pop(0).partition("=")
        if name != option:
            rest.append(name + equals + given)
        elif equals or left:
            value = given if equals else left.pop(0)
        else:
            raise UserError(f"{option} needs a value")
    return value, rest


def _without(prefix: str, arguments: Sequence[str]) -> list[str]:
    """The arguments without the options that begin with a prefix, and without their values."""
    rest, dropping = [], False
    for each in arguments:
        dropping = each.startswith(prefix) or (dropping and not each.startswith("--"))
        rest += [] if dropping else [each]
    return rest


def _distillations() -> str:
    from phyla.training.config import DISTILLATIONS, STAGES, DistillationConfig

    plain = DistillationConfig()
    lines = []
    for name, recipe in DISTILLATIONS.items():
        changed = (each.name for each in fields(recipe) if getattr(recipe, each.name) != getattr(plain, each.name))
        said = ", ".join(f"{each} {getattr(recipe, each)}" for each in changed)
        lines.append(f"  {name:<20} {said or 'the default: the distribution and the right token'}")
    lines += [f"  {name:<20} the stages {', '.join(stages)}" for name, stages in STAGES.items()]
    return "\n".join(lines)


class Training(NamedTuple):
    """What to train, where to, and how far."""

    experiment: "Experiment"
    out: Path | None
    max_steps: int | None


def _run(asked: Training) -> bool:
    """Whether it is finished."""
    use_all_cores(sequences(asked.experiment))
    from phyla.training import loop, run

    out = asked.out or run.default_folder(asked.experiment)
    return loop.train(asked.experiment, out, max_steps=asked.max_steps) is not None


def _training(
    experiment: "Experiment", sections: Sequence[str], arguments: Sequence[str], prog: str, description: str
) -> Training:
    hints = get_type_hints(type(experiment))
    options: list[Any] = [(each, hints[each], field(default=getattr(experiment, each))) for each in sections]
    steps_help, out_help = "Stop after this many steps, on the same schedule.", "The run's folder."
    options += [
        ("max_steps", Annotated[int | None, arg(help=steps_help)], field(default=None)),
        ("out", Annotated[Path | None, arg(help=out_help)], field(default=None)),
    ]
    Train = make_dataclass("Train", options, kw_only=True, frozen=True, namespace={"__doc__": description})
    chosen = parse(Train, arguments, prog=prog)
    changed = {each: getattr(chosen, each) for each in sections}
    return Training(replace(experiment, **changed), chosen.out, chosen.max_steps)


def _experiments() -> str:
    widest = max(map(len, configs.EXPERIMENTS))
    return "\n".join(f"  {name:<{widest}} {_summary(name)}" for name in configs.EXPERIMENTS)


def _summary(name: str) -> str:
    function = getattr(importlib.import_module(configs.EXPERIMENTS[name]), name.replace("-", "_").replace(".", "_"))
    return (inspect.getdoc(function) or "").partition("\n")[0]
