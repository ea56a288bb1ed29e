"""Models of other libraries as runs, and runs as models of other libraries."""

import json
import math
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from phyla.compression.matrices import dotted, weights
from phyla.compression.merge import is_linear
from phyla.models import formats
from phyla.models.errors import UserError
from phyla.models.formats import folder as folders
from phyla.models.formats.source import Source, load, to_state
from phyla.models.language_model import LanguageModel
from phyla.models.weights import materialize
from phyla.training import run, saved
from phyla.training.checkpoints import write_params
from phyla.training.config import Experiment
from phyla.training.data.config import DataConfig
from phyla.training.data.templates import CONFIG_FILE, ChatTemplate
from phyla.training.data.tokenizers import TOKENIZER_FILE, HuggingFaceTokenizer, Tokenizer, make_tokenizer


def import_model(source: Path, out: Path) -> None:
    """Makes a run of a foreign model: configuration, tokenizer if it has one, one checkpoint of the parameters.

    Raises UserError if the source cannot be read, naming the file, flag or tensor, or if `out` has files.
    """
    run.check_new(out)
    found = formats.open_source(source)
    tokenizer = find_tokenizer(found)
    parameters = load(found)
    data = DataConfig(
        tokenizer="bytes" if tokenizer is None else str(out / "tokenizer" / TOKENIZER_FILE),
        sequence_length=min(512, found.model.learned_positions or 512),
    )
    objective = "masked-token" if found.model.bidirectional else "next-token"
    experiment = Experiment(name=source.resolve().name, model=found.model, objective=objective, data=data)
    run.create(out, experiment, None if tokenizer is None else tokenizer.fingerprint())
    if tokenizer is not None:
        tokenizer.save(out / "tokenizer")
    write_params(out, to_state(found.model, parameters)[1])
    count = sum(math.prod(each.shape) for each in parameters.values())
    said = "" if tokenizer is not None else "; no tokenizer: it can be exported and gives logits, but reads no text"
    Console(highlight=False).print(f"{out}: {count:,} parameters{said}", markup=False, soft_wrap=True)


def find_tokenizer(source: Source) -> Tokenizer | None:
    """The source's own, or the tokenizer.json beside it; None if there is none."""
    if source.vocabulary is not None:
        core, bos_id, eos_id, text, names = source.vocabulary
        return HuggingFaceTokenizer(core, bos_id, eos_id, None if text is None else ChatTemplate(text, dict(names)))
    path = source.where / TOKENIZER_FILE
    return make_tokenizer(DataConfig(tokenizer=str(path))) if path.is_file() else None


def export_model(folder: Path, out: Path, *, format: str | None) -> None:
    """Writes a run's last checkpoint as a Hugging Face folder; a compressed one as the dense weights it stands for.

    Args:
        folder: the run.
        out: a new or empty folder.
        format: one of `formats.FORMATS`; None: the first that can say what the model is.

    Raises UserError if no format can, or this one cannot, naming the field.
    """
    experiment = run.read_experiment(folder)
    layout = formats.named(format) if format else formats.fitting(experiment.model)
    folders.check_expressible(layout, experiment.model)
    found = saved.load(folder)
    tokenizer = found.own_tokenizer
    flags = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
    }
    parameters = dense_parameters(found.model())
    folders.write_folder(out, layout, experiment.model, parameters, flags=flags)
    said = f"; dense, as {'+'.join(map(str, found.recipes))} left it" if found.recipes else ""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _write_tokenizer(out, tokenizer)
    elif tokenizer is not None:
        said += "; its tokenizer is bytes, which has no tokenizer.json"
    Console(highlight=False).print(f"{out}: {layout.name}{said}", markup=False, soft_wrap=True)


def dense_parameters(model: LanguageModel) -> dict[str, np.ndarray]:
    """By path; adapters are merged. Raises UserError for those that are no matrices."""
    if model.beginning is not None or not all(map(is_linear, weights(model).values())):
        raise UserError(
            "this model has adapters that are no matrices (a prompt, a state, bottlenecks): export its base"
        )
    return {dotted(path): np.asarray(jax.jit(materialize)(each)) for path, each in weights(model).items()}


def _write_tokenizer(out: Path, tokenizer: HuggingFaceTokenizer) -> None:
    text = tokenizer.to_json()
    (out / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    names = {token["id"]: token["content"] for token in json.loads(text)["added_tokens"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token in names:
            config[key] = names[token]
    if tokenizer.chat_template is not None:
        config |= tokenizer.chat_template.to_config()
    run.write_json(out / CONFIG_FILE, config)
