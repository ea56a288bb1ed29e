"""What is timed: callables that do their work once and give its seconds."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from phyla.models import sizes
from phyla.models.language_model import LanguageModel
from phyla.training import machine, sharding
from phyla.training.bench import BATCH, LENGTH
from phyla.training.config import Experiment
from phyla.training.generate import Generator, Sampling
from phyla.training.optimizer import make_optimizer
from phyla.training.saved import make_objective
from phyla.training.step import NOTHING, compile_step, initial_state, make_step

PROMPT, TOKENS = 32, 64
"""Of greedy decoding: the tokens before it, and those that are timed."""

Timed = Callable[[], float]


class TrainingStep(NamedTuple):
    """A compiled training step."""

    once: Timed
    peak_memory: int | None  # bytes, on all devices together


def training_step(experiment: Experiment, mesh: Mesh) -> TrainingStep:
    """Compiles a step on a batch of `BATCH` × `LENGTH` random tokens and takes one."""
    graphdef, params = nnx.split(sizes.abstract(experiment.model))
    optimizer = make_optimizer(experiment.optimizer, experiment.loop.steps, (params, NOTHING))

    def init() -> Any:
        return initial_state(nnx.state(LanguageModel(experiment.model, nnx.Rngs(0))), optimizer, experiment.loop)

    layout = sharding.shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=layout)()
    tokens = random_tokens(experiment, BATCH, LENGTH + 1)
    batch = sharding.put_batch({"tokens": tokens, "segment_ids": np.ones_like(tokens)}, mesh)
    step = make_step(graphdef, make_objective(experiment, mask_id=0), optimizer, experiment.loop)
    compiled = compile_step(step, state, batch, layout, mesh)
    state = jax.block_until_ready(compiled(state, batch)[0])

    def once() -> float:
        nonlocal state
        begin = time.perf_counter()
        state = jax.block_until_ready(compiled(state, batch)[0])
        return time.perf_counter() - begin

    each = machine.peak_memory(compiled)
    return TrainingStep(once, None if each is None else each * mesh.size)


class Inference:
    """Compiled prefill of `BATCH` × `LENGTH` tokens on a mesh, and decoding of one sequence on its first device."""

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._experiment, self._mesh = experiment, mesh
        self._graphdef, abstract = nnx.split(sizes.abstract(experiment.model))
        layout = sharding.shardings(abstract, mesh)
        init = jax.jit(lambda: nnx.state(LanguageModel(experiment.model, nnx.Rngs(0))), out_shardings=layout)
        self._params = init()
        self._generator = Generator(self._graphdef, Sampling(temperature=0))

    def prefill(self) -> Timed:
        """The next tokens after all of a batch, and the state; of an encoder, its hidden vectors."""
        tokens = random_tokens(self._experiment, BATCH, LENGTH)
        batch = sharding.put_batch({"tokens": tokens}, self._mesh)["tokens"]
        if self._experiment.model.bidirectional:
            encode = jax.jit(lambda params, tokens: nnx.merge(self._graphdef, params)(tokens)[0])
            return lambda: self._on_mesh(encode, batch)
        key = jax.random.key(0)
        return lambda: self._on_mesh(self._generator.prefill, batch, None, key, length=LENGTH)

    def _on_mesh(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
        with jax.set_mesh(self._mesh):
            return _seconds(function, self._params, *arguments, **options)

    def decode(self) -> Timed | None:
        """`TOKENS` tokens after a prompt, each the likeliest; None for an encoder."""
        if self._experiment.model.bidirectional:
            return None
        params = jax.device_put(self._params, self._mesh.devices.flat[0])
        prompt = random_tokens(self._experiment, 1, PROMPT)

        def once() -> float:
            room = PROMPT + TOKENS
            decoder = self._generator.prefill(params, prompt, None, jax.random.key(0), length=room)
            return _seconds(self._generator.decode, params, jax.block_until_ready(decoder), count=TOKENS)

        return once


def random_tokens(experiment: Experiment, rows: int, length: int) -> np.ndarray:
    """Token ids [rows, length]."""
    vocabulary = experiment.model.vocab_size
    assert vocabulary is not None
    return np.random.default_rng(0).integers(0, vocabulary, (rows, length), dtype=np.int32)


def _seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments, **options))
    return time.perf_counter() - begin
