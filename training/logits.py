"""What a model says of given tokens, in files: for comparison with other implementations."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phyla.models import formats
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.formats.folder import read_json
from phyla.models.formats.source import build
from phyla.models.language_model import LanguageModel
from phyla.training import saved
from phyla.training.generate import Sampling, generate

PROMPT = 9
"""Tokens of the first row that `write_logits` continues."""


def open_model(path: Path) -> tuple[ModelConfig, nnx.GraphDef, nnx.State]:
    """Of a run or of a foreign model. Raises UserError if it is neither."""
    config = path / "config.json"
    if config.exists() and "experiment" in read_json(config):
        found = saved.load(path)
        return found.experiment.model, found.graphdef, found.params
    source = formats.open_source(path)
    return source.model, *build(source)


def write_logits(model: Path, input: Path, output: Path, *, generate_tokens: int) -> None:
    """What a model says of given tokens, for comparison with other implementations.

    Args:
        model: a run or a foreign model.
        input: safetensors with `input_ids` [B, T] and, if wanted, `attention_mask` and `token_type_ids`, as large.
        output: safetensors with `logits` [B, T, V] float32, for encoders `last_hidden_state` [B, T, D] (and `logits`
            if the encoder has a head); with `generate_tokens`, `generated` [1, 9 + generate_tokens]: the first 9
            tokens of the first row and their greedy continuation.
        generate_tokens: how many.

    Raises UserError for wrong input, naming it.
    """
    if generate_tokens < 0:
        raise UserError(f"--generate must be at least 0, not {generate_tokens}")
    config, graphdef, params = open_model(model)
    given = _read_input(input, config)
    encoder = config.bidirectional
    if encoder and generate_tokens:
        raise UserError(f"{model} is an encoder: it continues nothing")
    tokens, mask, types = given["input_ids"], given.get("attention_mask"), given.get("token_type_ids")
    with_head = not encoder or config.head_transform is not None

    @jax.jit
    def outputs(params: nnx.State, tokens: jax.Array, mask: jax.Array | None, types: jax.Array | None) -> dict:
        network: LanguageModel = nnx.merge(graphdef, params)
        hidden, _ = network(tokens, None, mask, types)
        found = {"last_hidden_state": hidden.astype("float32")} if encoder else {}
        return found | ({"logits": network.logits(hidden)} if with_head else {})

    found = {name: np.array(x) for name, x in outputs(params, tokens, mask, types).items()}
    if generate_tokens:
        prompt = (tokens[0] if mask is None else tokens[0][mask[0] != 0])[:PROMPT]
        if config.learned_positions and len(prompt) + generate_tokens > config.learned_positions:
            raise UserError(f"{len(prompt)} + {generate_tokens} tokens exceed {config.learned_positions} positions")
        (drawn,) = generate(graphdef, params, [prompt], max_tokens=generate_tokens, sampling=Sampling(temperature=0.0))
        found["generated"] = np.concatenate([prompt, drawn])[None].astype(np.int64)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, output)


def _read_input(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    if "input_ids" not in given:
        raise UserError(f"{path} has no input_ids, only {', '.join(sorted(given)) or 'nothing'}")
    tokens = given["input_ids"]
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise UserError(f"{path}: input_ids must be integers [B, T], not {tokens.dtype} {list(tokens.shape)}")
    found = {"input_ids": tokens}
    limits = {"input_ids": config.vocab_size or 0, "attention_mask": 2}
    if config.token_types:
        limits["token_type_ids"] = config.token_types
    for name, limit in limits.items():
        if name in given:
            array = given[name]
            if array.shape != tokens.shape:
                raise UserError(f"{path}: {name} is {list(array.shape)}, input_ids {list(tokens.shape)}")
            if array.min() < 0 or array.max() >= limit:
                raise UserError(f"{path}: {name} must be in [0, {limit}), not {array.min()} … {array.max()}")
            found[name] = array.astype(np.int32)
    return found
