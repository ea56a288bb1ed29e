"""The command line's entrance. It imports nothing heavy before it knows the command: `phyla --help` is instant."""

import importlib
import sys
from collections.abc import Sequence
from keyword import iskeyword

from phyla import __version__
from phyla.models.errors import Diverged, UserError, choose

COMMANDS = {
    "train": "train one experiment",
    "finetune": "train on from a run: all of its model, or what a recipe adds to it",
    "distill": "train a student to say what a trained run says, across architectures",
    "compare": "train several at one budget and report which is better",
    "evaluate": "validation loss of a trained run, on its own data or any other, or how it solves problems",
    "generate": "continue prompts with a trained run",
    "compress": "make a smaller run of a run: quantized, pruned, factorised, coded",
    "average": "make one adapter of several of the same base",
    "import": "make a run of another library's model",
    "export": "write a run as another library's model",
    "logits": "what a run or another library's model says of given tokens",
    "bench": "measure this code on this machine, alone or beside PyTorch",
}

MODULES = {
    **dict.fromkeys(("train", "finetune", "distill"), "phyla.experiments"),
    **dict.fromkeys(("import", "export", "logits"), "phyla.exchange"),
}
"""Where a command is, if not in `phyla.commands`."""

HELP = f"""\
usage: phyla COMMAND [OPTIONS]

Train, compress and compare language-model architectures with one loop.

commands:
{"\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())}

options:
  --help     this text; after a command, that command's
  --version  the version

examples:
  phyla compare                                 every small experiment, on the embedded corpus
  phyla train transformer --max-steps 50        the first 50 steps of one of them
  phyla train transformer --help                every field that can be changed
  phyla generate runs/NAME --prompt "It is"     what it has learned
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0; 2 for the user's error and 1 for a diverged run, each told in one line; 130 when interrupted. Any other
    exception keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(HELP, end="", file=sys.stderr)
        return 2
    name, *arguments = argv
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"phyla {__version__}")
        return 0
    prog = "phyla"
    try:
        choose("command", name, COMMANDS)
        prog = f"phyla {name}"
        module = importlib.import_module(MODULES.get(name, "phyla.commands"))
        getattr(module, name + "_" * iskeyword(name))(arguments)
    except (UserError, Diverged) as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0
