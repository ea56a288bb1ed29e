"""Adapters of one base: put onto it in turn, averaged, taken off again."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from phyla.cli import main
from phyla.compression.compress import abstract, compress
from phyla.compression.matrices import dotted
from phyla.compression.merge import bare
from phyla.compression.recipes import parse
from phyla.models.beginnings import EncodedState, LearnedState
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mlp import GatedMLPConfig
from phyla.models.weights import trainable
from phyla.training import run
from phyla.training.adapters import average, on_base, save_on_base
from phyla.training.checkpoints import Checkpoints
from phyla.training.config import Experiment, OptimizerConfig
from phyla.training.optimizer import state_bytes
from phyla.training.saved import Saved, load, prepared
from phyla.training.start import what_is_trained
from phyla.training.step import split

BLOCK = BlockConfig(mixer=AttentionConfig(heads=2), channel=GatedMLPConfig(expand=2.0))
MODEL = ModelConfig(width=16, layers=2, vocab_size=23, pattern=(BLOCK,))
TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 0, 23)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    run.create(folder, Experiment(name="base", model=MODEL), None)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_params(split(LanguageModel(MODEL, nnx.Rngs(0)))[1])
    return load(folder)


def trained(base: Saved, out, name: str, seed: int = 0, loop_seed: int = 0) -> LanguageModel:
    """A run of a recipe, as if it were trained."""
    experiment = dataclasses.replace(base.experiment, base=str(base.folder), recipes=name)
    experiment = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, seed=loop_seed))
    model = prepared(base.model(), experiment)
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model, trainable)):
        variable[...] = variable[...] + 0.3 * rng.standard_normal(variable.shape, np.float32)
    save_on_base(out, experiment, base, parse(name), model)
    return model


def arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    return {dotted(path): np.asarray(each[...]) for path, each in nnx.to_flat_state(nnx.state(model))}


def merged(model: LanguageModel) -> dict[str, np.ndarray]:
    return arrays(compress(model, parse("merge"))[-1].model)


logits = nnx.jit(lambda model: model.logits(model(TOKENS)[0]))


def test_the_mean_of_products_is_that_of_the_models(base, tmp_path):
    """Of different ranks, scales and matrices: exactly, 3 to 1; what is saved is small."""
    names = ("lora-r2-a16@mixer", "rslora-r1@mixer\\.q|down", "pissa-r1@down")
    models = [trained(base, tmp_path / str(i), name, i) for i, name in enumerate(names)]
    folders = [str(tmp_path / str(i)) for i in range(3)]
    assert main(["average", *folders, "--weights", "3", "1", "1", "--out", str(tmp_path / "mean")]) == 0
    found, each = load(tmp_path / "mean"), [merged(model) for model in models]
    result = merged(found.model())
    for name in result:
        np.testing.assert_allclose(result[name], 0.6 * each[0][name] + 0.2 * (each[1][name] + each[2][name]), atol=1e-5)
    assert sum(np.abs(result[name] - array).max() > 0.1 for name, array in arrays(base.model()).items()) == 5
    assert re.fullmatch(r"lora-r3-a3@.*", str(found.recipes[-1]))
    assert not (tmp_path / "mean" / "checkpoints" / "0" / "frozen").exists()


@pytest.mark.parametrize("name", ["ia3", "intrinsic-7-fastfood"])
def test_the_mean_of_what_was_trained(base, tmp_path, name):
    """Where what it does is linear in that, merged models have the mean too."""
    models = [trained(base, tmp_path / str(i), name, i) for i in range(2)]
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    found = load(tmp_path / "mean")
    assert str(found.recipes[-1]) == name
    result, each = merged(found.model()), [merged(model) for model in models]
    for one in result:
        np.testing.assert_allclose(result[one], (each[0][one] + each[1][one]) / 2, atol=1e-5)


def test_a_network_is_left_out_of_a_prefix(base, tmp_path):
    """Of one run, whose answers stay the same; of two, as the mean of what their networks make."""
    models = [trained(base, tmp_path / str(i), "prefix-3-mlp", i) for i in range(2)]
    assert isinstance(models[0].beginning, EncodedState)
    average([tmp_path / "0"], tmp_path / "plain")
    plain = load(tmp_path / "plain")
    assert str(plain.recipes[-1]) == "prefix-3"
    assert type(plain.model().beginning) is LearnedState
    _, params, _ = split(plain.model())
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * 2 * 3 * 16
    )  # layers, keys and values, tokens, width
    np.testing.assert_allclose(logits(plain.model()), logits(models[0]), atol=1e-5)
    assert np.abs(logits(plain.model()) - logits(base.model())).max() > 0.01
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    found = load(tmp_path / "mean").model()
    states = [jax.tree.leaves(model.beginning.one(model)) for model in (*models, found)]
    for one, other, mean in zip(*states, strict=True):
        np.testing.assert_allclose((one + other) / 2, mean, atol=1e-5)


def test_reparametrisation_is_the_network_of_the_paper(base):
    """Linear, tanh, linear of a vector for each token (Li and Liang 2021, section 4.3), in float64."""
    model = compress(base.model(), parse("prefix-3-mlp"))[-1].model
    begin = {name: np.asarray(model.beginning.value(name), np.float64) for name in model.beginning.names[:2]}
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model.beginning, trainable)):
        variable[...] = variable[...] + 0.3 * rng.standard_normal(variable.shape, np.float32)
    own = {name: array.astype(np.float64) for name, array in arrays(model.beginning).items()}
    hidden = np.tanh(own["vectors"] @ own["inner.weight"] + own["inner.bias"])
    made = hidden @ own["outer.weight"] + own["outer.bias"]
    for i, (name, first) in enumerate(begin.items()):
        right = made[:, i * 32 : (i + 1) * 32].reshape(3, 2, 1, 2, 8)  # tokens, layers, batch, heads, of a head
        np.testing.assert_allclose(model.beginning.value(name), first + np.moveaxis(right, 0, 3), atol=1e-5)


def test_adapters_are_switched_on_one_base(base, tmp_path):
    """The base's arrays are shared and stay what they were, to the bit; without adapters there is no more."""
    before, first = arrays(base.model()), logits(base.model())
    names = ("lora-r2", "prefix-2", "intrinsic-5")
    for i, name in enumerate(names):
        model = trained(base, tmp_path / name, name, i)
        found = on_base(tmp_path / name, base)
        again = bare(found)  # before nnx.jit, which gives a model new arrays
        np.testing.assert_array_equal(logits(found), logits(load(tmp_path / name).model()))
        np.testing.assert_array_equal(logits(found), logits(model))
        held = dict(nnx.to_flat_state(nnx.state(again)))
        for path, each in nnx.to_flat_state(nnx.state(base.model())):
            assert held[path][...].unsafe_buffer_pointer() == each[...].unsafe_buffer_pointer()
            assert held[path].get_metadata() == each.get_metadata() | {"trainable": True}
        assert held.keys() == dict(nnx.to_flat_state(nnx.state(base.model()))).keys()
    for name, array in arrays(base.model()).items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(logits(base.model()), first)
    rounded = compress(base.model(), parse("nf4"))[-1].model
    for one, other in zip(
        jax.tree.leaves(bare(compress(rounded, parse("lora-r2"))[-1].model)), jax.tree.leaves(rounded), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_what_has_no_mean_is_refused(base, tmp_path):
    cases = {"lora": "lora-r2", "dora": "dora-r2", "full": "lora-r7@down", "a": "intrinsic-3", "b": "intrinsic-3"}
    for i, (folder, name) in enumerate(cases.items()):
        trained(base, tmp_path / folder, name, i, loop_seed=i)

    def refused(error, *names, **options):
        with pytest.raises(UserError, match=error):
            average([tmp_path / name for name in names], tmp_path / "mean", **options)
        assert not (tmp_path / "mean").exists()

    refused("lora-r2, .*dora with dora-r2: they have no mean", "lora", "dora")
    refused("the mean has the rank 14, and would be as large", "full", "full")
    refused("other random subspaces", "a", "b")
    refused("2 weights for 1 runs", "lora", weights=[1, 2])
    refused("must not add up to 0", "lora", "lora", weights=[1, -1])
    with pytest.raises(UserError, match="adapts no base"):
        average([base.folder], tmp_path / "mean")
    with pytest.raises(UserError, match="is not of the base"):
        on_base(tmp_path / "lora", dataclasses.replace(base, folder=tmp_path))


LAYERS, WIDTH, HIDDEN, TOKENS_BEFORE, RANK = 2, 16, 32, 3, 2
TRAINED = {
    "": 23 * WIDTH + WIDTH + LAYERS * (2 * WIDTH + 4 * WIDTH**2 + 3 * WIDTH * HIDDEN),
    f"lora-r{RANK}": LAYERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + HIDDEN)),
    f"nf4+lora-r{RANK}": LAYERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + HIDDEN)),
    "ia3": LAYERS * (2 * WIDTH + HIDDEN),
    f"prefix-{TOKENS_BEFORE}": LAYERS * 2 * TOKENS_BEFORE * WIDTH,
    f"prompt-{TOKENS_BEFORE}": TOKENS_BEFORE * WIDTH,
    "intrinsic-7": 7,
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_optimizer_has_state_for_what_is_trained_alone(name):
    """Two float32 moments each for AdamW, one for Lion, and two counters; nothing is computed."""
    model = abstract(MODEL, parse(name) if name else ())
    _, params, _ = split(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == TRAINED[name]
    assert state_bytes(OptimizerConfig(), params) == 8 * count + 2 * 4
    assert state_bytes(OptimizerConfig(name="lion"), params) == 4 * count + 2 * 4
    said = what_is_trained(model, OptimizerConfig())
    if name:
        assert f"trains {count:,} numbers beside {TRAINED['']:,}" in said
        assert f"adamw keeps {8 * count + 8:,} bytes for them (for all: {8 * TRAINED[''] + 8:,})" in said
    else:
        assert not said
