"""Commands that do not train: each turns its arguments into a dataclass and calls one function of the floors below."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from phyla import configs
from phyla.arguments import parse
from phyla.cores import sequences, use_all_cores
from phyla.models.errors import UserError, choose


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Trains experiments at one parameter budget on the same tokens, and reports which is better.

    Interrupted, the same command goes on and repeats nothing that is finished.

    examples:
      phyla compare
      phyla compare transformer mamba --seeds 3
      phyla compare --budget-minutes 8 --parameters 2000000
      phyla compare --compress int8 nf4 gptq-int4
      phyla compare --compress int4 --beside runs/mamba-qat-int4
    """

    names: Annotated[tuple[str, ...], Positional, arg(metavar="[NAME ...]")] = configs.SMALL
    """Experiments: one for each architecture."""
    parameters: int | None = None
    """Parameters of each, met within 1 % by its width; None: those of the first."""
    seeds: int = 1
    """Runs of each."""
    tokens: int | None = None
    """Training tokens of each run; None: as many as the first experiment says."""
    budget_minutes: float | None = None
    """Instead of tokens: minutes of training for all runs together, on this machine."""
    compress: tuple[str, ...] = ()
    """Recipes (`phyla compress --list`): each makes a smaller model of every architecture's first run."""
    beside: tuple[Path, ...] = ()
    """Runs to stand beside them in the report, however they were made: distilled, retrained, quantization-aware."""
    out: Path | None = None
    """Folder of the report and the runs; None: runs/compare, with the names if any were given."""
    json: Path | None = None
    """Where all figures go as JSON; None: only results.jsonl in the folder."""


def compare(arguments: Sequence[str]) -> None:
    """`phyla compare [NAME ...]`."""
    options = parse(Compare, arguments, prog="phyla compare")
    experiments = [configs.experiment(name) for name in options.names]
    use_all_cores(math.gcd(*map(sequences, experiments)))
    from phyla.training import compare

    compare.compare(
        experiments,
        out=options.out or comparison_folder(options.names),
        parameters=options.parameters,
        seeds=options.seeds,
        tokens=options.tokens,
        budget_minutes=options.budget_minutes,
        compress=options.compress,
        beside=options.beside,
        json=options.json,
    )


def comparison_folder(names: Sequence[str]) -> Path:
    """Where a comparison goes by default."""
    return Path("runs") / "-".join(["compare", *(() if names == configs.SMALL else names)])


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Validation loss of a run: nats per token and bits per byte. Or, by a protocol, how it solves word problems.

    Of conversations it is the loss of the responses, and how many of the short ones it gives word for word.

    examples:
      phyla evaluate runs/RUN
      phyla evaluate runs/RUN --data "texts/*.txt" --json loss.json
      phyla evaluate runs/RUN --protocol pal --problems 300
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run's folder."""
    data: str | None = None
    """Source of the text, as in --data.source; None: the run's own validation text."""
    exact_tokens: int | None = None
    """Of conversations: the longest responses to compare word for word, in tokens; 0: none; None: 16."""
    protocol: Literal["direct", "cot", "pal"] | None = None
    """Instead of the loss: held-out arithmetic problems, answered at once, by a chain of thought, or by Python that is
    run with limits on time, memory, files and network."""
    shots: int | None = None
    """For a protocol: solved problems before each; None: none after training on conversations, else 4."""
    problems: int | None = None
    """For a protocol: how many; None: 300."""
    max_tokens: int | None = None
    """For a protocol: tokens of a response; None: 256."""
    json: Path | None = None
    """Where the table goes as JSON, after a protocol with every response; None: beside the run."""

    def __post_init__(self):
        for name, least in (("exact_tokens", 0), ("shots", 0), ("problems", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for_loss, for_protocol = ("data", "exact_tokens"), ("shots", "problems", "max_tokens")
        for name in for_protocol if self.protocol is None else for_loss:
            if getattr(self, name) is not None:
                takes = "needs --protocol" if self.protocol is None else "does not go with --protocol"
                raise UserError(f"--{name.replace('_', '-')} {takes}")


def evaluate(arguments: Sequence[str]) -> None:
    """`phyla evaluate RUN`."""
    options = parse(Evaluate, arguments, prog="phyla evaluate")
    if options.protocol is not None:
        from phyla.training.protocols import evaluate_protocol

        evaluate_protocol(
            options.run,
            options.protocol,
            shots=options.shots,
            count=options.problems or 300,
            max_tokens=options.max_tokens or 256,
            json=options.json,
        )
        return
    from phyla.training.evaluate import EXACT_TOKENS, evaluate_run

    exact_tokens = EXACT_TOKENS if options.exact_tokens is None else options.exact_tokens
    evaluate_run(options.run, data=options.data, exact_tokens=exact_tokens, json=options.json)


@dataclass(frozen=True, kw_only=True)
class Generate:
    r"""Continues prompts with a run's model.

    examples:
      phyla generate runs/RUN --prompt "It is a truth"
      phyla generate runs/RUN --prompt "She" --prompt "He said" --temperature 0 --max-tokens 50
      phyla generate runs/RUN --prompt "Chapter" --top-p 0.9 --stop "." --stop $'\n'
      phyla generate runs/TEACHER --prompt "" --copies 64 --temperature 1 --text teacher.jsonl
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run's folder."""
    prompt: UseAppendAction[tuple[str, ...]]
    """Text to continue; give it again for a batch."""
    temperature: float = 0.8
    """Of the softmax; 0: always the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the likeliest tokens that reach this probability together."""
    min_p: float | None = None
    """Only tokens at least this likely, relative to the likeliest."""
    seed: int = 0
    """Of the sampling."""
    max_tokens: int = 200
    """Tokens after each prompt."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """Text at which a continuation ends; give it again for more."""
    copies: int = 1
    """Continuations of each prompt."""
    text: Path | None = None
    """Where they go as documents to train a student on (`--data.source FILE.jsonl`), instead of being printed."""
    json: Path | None = None
    """Where the continuations go as JSON; None: beside the run."""

    def __post_init__(self):
        if not self.prompt:
            raise UserError('give at least one prompt: --prompt "It is a truth"')
        if self.copies < 1:
            raise UserError(f"--copies must be at least 1, not {self.copies}")
        if self.text is not None and self.text.suffix != ".jsonl":
            raise UserError(f"--text must be a .jsonl file, not {self.text}")


def generate(arguments: Sequence[str]) -> None:
    """`phyla generate RUN --prompt TEXT`."""
    options = parse(Generate, arguments, prog="phyla generate")
    from phyla.training.generate import generate_run

    generate_run(
        options.run,
        list(options.prompt) * options.copies,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        max_tokens=options.max_tokens,
        stop=list(options.stop),
        json=options.json,
        text_file=options.text,
    )


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Makes a smaller run of a run, and tells what it cost.

    Methods are applied in their order; the result can be evaluated, continued with `generate`, exported and compressed
    again.

    examples:
      phyla compress --list
      phyla compress runs/RUN int8 --out runs/RUN-int8
      phyla compress runs/RUN magnitude-2:4+nf4 --out runs/RUN-small
      phyla compress runs/RUN gptq-int4-g128 --out runs/RUN-int4 --calibration "books/*.txt"
    """

    run: Annotated[Path | None, Positional, arg(metavar="RUN")] = None
    """The run's folder."""
    recipe: Annotated[tuple[str, ...], Positional, arg(metavar="[RECIPE ...]")] = ()
    """Methods, chained with + or one after the other."""
    out: Path | None = None
    """The new run's folder: new or empty."""
    calibration: str | None = None
    """The text that methods read which need one, as `--data.source`; None: what the run was trained on."""
    tokens: int | None = None
    """How much of it at most; None: 65,536."""
    validation_tokens: int | None = None
    """How much of the validation text tells what it cost, at most; None: all."""
    speed: bool = True
    """Time prefill and decoding, before and after."""
    list: bool = False
    """Only explain every method, in a line each."""
    json: Path | None = None
    """Where the figures go as JSON; None: compression.json in the new run."""

    def __post_init__(self):
        if self.list:
            return
        if self.run is None:
            raise UserError("RUN must be given")
        if not self.recipe:
            raise UserError("name at least one method (`phyla compress --list` explains them)")
        if self.out is None:
            raise UserError("--out must be given")


def compress(arguments: Sequence[str]) -> None:
    """`phyla compress RUN RECIPE ... --out OUT`."""
    options = parse(Compress, arguments, prog="phyla compress")
    from phyla.compression import recipes

    if options.list:
        print(recipes.explained())
        return
    chosen = recipes.parse("+".join(options.recipe))
    assert options.run is not None
    assert options.out is not None
    from phyla.training.compress import Calibration, compress_run, show

    given = {"source": options.calibration, "tokens": options.tokens}
    given = {name: value for name, value in given.items() if value is not None}
    calibration = Calibration(**given) if given else None
    record = compress_run(
        options.run,
        chosen,
        options.out,
        calibration=calibration,
        speed=options.speed,
        validation_tokens=options.validation_tokens,
        json=options.json,
    )
    show(options.out, record)


@dataclass(frozen=True, kw_only=True)
class Average:
    """Makes a run of the mean of runs of one base; only the mean adapter is saved.

    LoRA adapters may have any ranks and matrices: their mean has all their factors. Other recipes must be the same.
    What a prefix or a prompt was trained through (prefix-16-mlp, ptuning-16) is left out, also of one run alone.

    examples:
      phyla average runs/letters runs/novels --out runs/both
      phyla average runs/letters runs/novels --weights 3 1 --out runs/more-letters
      phyla average runs/prefix-mlp --out runs/prefix
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN ...")]
    """The runs' folders."""
    out: Path
    """The new run's folder: new or empty."""
    weights: tuple[float, ...] | None = None
    """One for each run; they are divided by their sum. None: all the same."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("RUN must be given")


def average(arguments: Sequence[str]) -> None:
    """`phyla average RUN ... --out OUT`."""
    options = parse(Average, arguments, prog="phyla average")
    from phyla.training.adapters import average

    average(options.runs, options.out, weights=options.weights)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures this code on this machine.

    examples:
      phyla bench scan
      phyla bench models
      phyla bench models llama mamba --peers ~/torch/bin/python --json models.json
      phyla bench kernels --target v5e --op ssd
    """

    what: Annotated[Literal["scan", "models", "kernels"], Positional]
    """scan: a Mamba training step over the same step without its scan. models: every architecture at one size.
    kernels: every op against what its bytes and operations allow, for a TPU without having one."""
    names: Annotated[tuple[str, ...], Positional, arg(metavar="[NAME ...]")] = ()
    """Architectures, for models; none: all."""
    peers: Path | None = None
    """For models: a Python that has torch, transformers and mambapy, whose models are timed in turn with ours."""
    target: Literal["v5e", "v5p", "v6e", "tpu7x", "h100", "cpu"] | None = None
    """For kernels: a chip to compile for, or cpu to time them there; None: what is here, or v5e. h100 needs the extra
    gpu."""
    op: UseAppendAction[tuple[str, ...]] = ()
    """For kernels: one op (repeatable); none: all."""
    rounds: int = 15
    """How often each is timed; figures are medians."""
    json: Path | None = None
    """Where the table goes as JSON; None: runs/bench-scan.json and so on."""

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"--rounds must be at least 1, not {self.rounds}")
        for what, given in (
            ("models", {"--peers": self.peers, "names": self.names}),
            ("kernels", {"--target": self.target, "--op": self.op}),
        ):
            surplus = [name for name, value in given.items() if value]
            if self.what != what and surplus:
                raise UserError(f"bench {self.what} takes no {surplus[0]}; bench {what} does")


def bench(arguments: Sequence[str]) -> None:
    """`phyla bench scan`, `phyla bench models [NAME ...]`, `phyla bench kernels`."""
    options = parse(Bench, arguments, prog="phyla bench")
    if options.what == "kernels":
        from phyla.training.bench.kernels import bench_kernels

        bench_kernels(options.op, target=options.target, json=options.json, rounds=options.rounds)
        return
    from phyla.training.bench import BATCH

    if options.what == "scan":
        from phyla.training.bench.scan import bench_scan

        use_all_cores(BATCH)
        bench_scan(options.json, options.rounds)
        return
    from phyla.configs.benchmarks import ARCHITECTURES
    from phyla.training.bench.models import bench_models

    names = [choose("architecture", name, ARCHITECTURES) for name in options.names or ARCHITECTURES]
    use_all_cores(BATCH)
    architectures = {name: ARCHITECTURES[name]() for name in names}
    bench_models(architectures, json=options.json, rounds=options.rounds, peers=options.peers)
