"""Experiments: functions that return an `Experiment`, by name.

`EXPERIMENTS` maps a name to the module that defines a function of that name, imported when asked for.
"""

import importlib
from typing import TYPE_CHECKING

from phyla.models.errors import choose

if TYPE_CHECKING:
    from phyla.training.config import Experiment

SMALL = ("transformer", "mamba", "jamba", "rwkv", "xlstm")
"""The small experiments on the embedded corpus that a bare `phyla compare` compares."""

EXPERIMENTS = {
    **dict.fromkeys(SMALL, "phyla.configs.small"),
    "arithmetic": "phyla.configs.instruction",
    **dict.fromkeys(
        (
            "gpt2",
            "bert-base",
            "distilbert",
            "albert-base",
            "bloom-560m",
            "llama-3-8b",
            "smollm2-135m",
            "mixtral-8x7b",
            "mamba-130m",
            "mamba-370m",
            "mamba-790m",
            "mamba-1.4b",
            "mamba-2.8b",
            "mamba2-2.7b",
            "jamba-v0.1",
            "jamba-1.5-large",
            "rwkv4-169m",
            "rwkv4-430m",
            "rwkv4-1.5b",
            "rwkv4-3b",
            "rwkv4-7b",
            "rwkv4-14b",
            "rwkv7-0.1b",
            "rwkv7-0.4b",
            "rwkv7-1.5b",
            "rwkv7-2.9b",
            "xlstm-7b",
        ),
        "phyla.configs.published",
    ),
}


def experiment(name: str) -> "Experiment":
    """The experiment of that name. Raises UserError with the nearest name if there is none."""
    choose("experiment", name, EXPERIMENTS)
    function = name.replace("-", "_").replace(".", "_")
    return getattr(importlib.import_module(EXPERIMENTS[name]), function)()
