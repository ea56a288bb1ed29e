"""Adapters on each of the five families: what they train, what they leave, what they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from phyla import configs
from phyla.compression.adapters import BIASES, principal, targets
from phyla.compression.compress import Step, abstract, compress
from phyla.compression.matrices import dotted, weights
from phyla.compression.recipes import parse
from phyla.models.adapted import Adapter, DoRA, LoRA, PiSSA
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import materialize
from phyla.training.config import LoopConfig
from phyla.training.objectives import next_token
from phyla.training.step import NOTHING, initial_state, make_step, split

VOCABULARY = 23
TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 0, VOCABULARY)


def config(family: str) -> ModelConfig:
    """The small experiment's model, tiny."""
    model = configs.experiment(family).model
    layers = max(2, len(model.pattern) + len(model.prefix))
    return dataclasses.replace(model, width=32 if family == "rwkv" else 16, layers=layers, vocab_size=VOCABULARY)


@functools.cache
def built(family: str) -> LanguageModel:
    """With random values wherever the initialisation has zeros."""
    model = LanguageModel(config(family), nnx.Rngs(0))
    return disturbed(model, nnx.Param)


def disturbed(model: LanguageModel, *what) -> LanguageModel:
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, *what)):
        variable[...] = np.asarray(variable[...]) + 0.1 * rng.standard_normal(variable.shape, np.float32)
    return model


@functools.cache
def adapted(family: str, name: str) -> Step:
    """As it begins."""
    return compress(built(family), parse(name))[-1]


def logits(model: LanguageModel) -> np.ndarray:
    graphdef, params = nnx.split(model)

    @jax.jit
    def found(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(TOKENS)[0])

    return np.asarray(found(params))


plain = functools.cache(lambda family: logits(built(family)))


def leaves(state) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


CHANGES = ("prefix-3", "prompt-3", "ptuning-3")
EVERY = ("lora-r2", "ia3", "houlsby-2", "state", "prefix-3")
SOME = ("rslora-r2", "dora-r2", "pissa-r2", "pfeiffer-2", "bitfit", "prompt-3", "ptuning-3")
NOT = {("transformer", "state"): "no layer of this model has a state", ("transformer", "bitfit"): "it has no biases"}
CASES = [(family, name) for name in EVERY for family in configs.SMALL]
CASES += [(family, name) for name in SOME for family in ("jamba", "rwkv")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_steps_train_what_is_new_and_nothing_else(family, name):
    if (family, name) in NOT:
        with pytest.raises(UserError, match=NOT[family, name]):
            abstract(config(family), parse(name))
        return
    step = adapted(family, name)
    graphdef, params, frozen = split(step.model)
    if name not in CHANGES:
        loss = functools.partial(next_token, chunk=64)
    begin = leaves(params)
    assert begin
    optimizer = optax.adam(1e-2)
    state = initial_state(params, optimizer, LoopConfig(steps=2))._replace(frozen=(frozen, NOTHING))
    run = jax.jit(make_step(graphdef, functools.partial(next_token, chunk=64), optimizer, LoopConfig(steps=2)))
    batch = {"tokens": TOKENS, "segment_ids": jnp.ones_like(TOKENS).at[1, 6:].set(2)}
    state, first = run(state, batch)
    state, second = run(state, batch)
    assert float(first.skipped) == float(second.skipped) == 0
    assert float(second.loss) < float(first.loss)
    # Every parameter of the adapter is moved by the two steps (LoRA's A, behind a B of zeros, by the second).
    after = leaves(state.params)
    still = [name for name in begin if np.array_equal(begin[name], after[name])]
    assert not [name for name in still if not _useless(name)], still
    # What is frozen is what it was, to the bit; of the base, all is there.
    for path, leaf in leaves(state.frozen[0]).items():
        np.testing.assert_array_equal(leaf, leaves(frozen)[path])
    if name != "bitfit":
        base = sorted(leaf.tobytes() for leaf in leaves(nnx.state(built(family))).values())
        held = sorted(leaf.tobytes() for leaf in leaves(state.frozen[0]).values())
        assert not [one for one in base if one not in set(held)]
    # The optimizer knows of nothing else.
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))


def _useless(name: str) -> bool:
    """A number of a state that no answer depends on."""
    return False
