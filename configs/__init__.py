"""Experiments: functions that return an `Experiment`, by name.

`EXPERIMENTS` maps a name to the module that defines a function of that name, imported when asked for.
"""

import importlib
from typing import TYPE_CHECKING

from phyla.models.errors import choose

if TYPE_CHECKING:
    from phyla.training.config import Experiment

EXPERIMENTS = {
    "transformer": "phyla.configs.small",
    "mamba": "phyla.configs.small",
}

SMALL = ("transformer", "mamba")
"""The small experiments on the embedded corpus: what a bare `phyla compare` compares."""


def experiment(name: str) -> "Experiment":
    """The experiment of that name. Raises UserError with the nearest name if there is none."""
    choose("experiment", name, EXPERIMENTS)
    function = name.replace("-", "_").replace(".", "_")
    return getattr(importlib.import_module(EXPERIMENTS[name]), function)()
