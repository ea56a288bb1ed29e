"""Checkpoints of other libraries: read (`open_source`, `load`) and written (`write_folder`).

One file a family, a table used in both directions; a module is imported when its family is asked for.
"""

import importlib
from pathlib import Path

from phyla.models.config import ModelConfig
from phyla.models.errors import UserError, choose
from phyla.models.formats.folder import PICKLES, check_expressible, open_folder, refuse_pickle
from phyla.models.formats.source import Source
from phyla.models.formats.table import Format

FORMATS = {  # `model_type` of config.json: module
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "gpt2": "gpt2",
    "bloom": "bloom",
    "bert": "bert",
    "distilbert": "distilbert",
    "albert": "albert",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "jamba": "jamba",
    "xlstm": "xlstm",
    "xlstm-original": "xlstm_nxai",
    "rwkv": "rwkv",
    "rwkv7-reference": "rwkv7",
}


def named(model_type: str) -> Format:
    """The format of a `model_type`. Raises UserError with the nearest for an unknown one."""
    module = FORMATS[choose("format", str(model_type), FORMATS)]
    return importlib.import_module(f"phyla.models.formats.{module}").FORMAT


def fitting(model: ModelConfig) -> Format:
    """The first format that can say what the model is. Raises UserError if none can."""
    for name in FORMATS:
        layout = named(name)
        try:
            check_expressible(layout, model)
        except UserError:
            continue
        return layout
    raise UserError(f"none of the formats {', '.join(FORMATS)} can say what this model is")


def open_source(path: Path) -> Source:
    """Opens a Hugging Face folder, a GGUF file or a llama2.c file. Only names and shapes are read.

    Raises UserError if it is none of these, or a pickle, and for a flag or a file that does not fit, naming it.
    """
    if path.is_dir():
        return open_folder(path, named)
    if not path.exists():
        raise UserError(f"no file or folder {path}")
    if path.suffix == ".gguf":
        from phyla.models.formats import gguf  # an optional dependency

        return gguf.open_file(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} says nothing of its model; give the folder that has its config.json: {path.parent}")
    if path.suffix == ".bin" and not is_pickle(path):
        from phyla.models.formats import llama2c

        return llama2c.open_file(path)
    if path.suffix in PICKLES:
        refuse_pickle(path)
    raise UserError(f"{path} is neither a Hugging Face folder nor a .gguf nor a llama2.c .bin file")


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle or as PyTorch's archive of one."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
