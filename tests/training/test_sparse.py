"""Zeros while training: exact under every optimizer, as many as the formulas say, and the same after a resume."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from phyla import configs
from phyla.cli import main
from phyla.compression.matrices import places, weights
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.quantized import Quantized
from phyla.models.weights import constant, materialize, normal, parameter
from phyla.training.config import OptimizerConfig, SparsityConfig
from phyla.training.loop import train
from phyla.training.optimizer import make_optimizer, schedule
from phyla.training.saved import load
from phyla.training.sparse import Sparse, due, largest, share_of_swaps, share_of_zeros, sparse

STEPS = 100
MODEL = configs.experiment("transformer").model


class Parameters(nnx.Module):
    """Two layers' matrices, one that begins at zero, a table, and a scale."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        own: Any = {"weight_decay": True, "matrix": True}
        self.matrix = parameter(normal(1.0), (2, 8, 12), ("layers", "embed", "mlp"), rngs, **own)
        self.adapter = parameter(constant(0.0), (4, 8), ("rank", "embed"), rngs, **own)
        self.table = parameter(normal(1.0), (5, 8), ("vocab", "embed"), rngs, weight_decay=True)
        self.scale = parameter(constant(0.0), (8,), ("embed",), rngs)


def pruned(how: str) -> Any:
    """Their state, with zeros in `matrix`."""
    module = Parameters()
    w = np.array(module.matrix[...])
    if how == "2:4":
        order = np.argsort(np.argsort(np.abs(w).reshape(2, 2, 4, 12), axis=2), axis=2)
        w = w.reshape(2, 2, 4, 12) * (order >= 2)
    else:
        w = np.where(np.abs(w) < np.median(np.abs(w)), 0, w)
    module.matrix[...] = jnp.asarray(w.reshape(2, 8, 12))
    return nnx.state(module)


def optimizer_of(
    params: Any, sparsity: SparsityConfig, held: bool = False, **options: Any
) -> optax.GradientTransformation:
    given: Any = {"learning_rate": 0.05, "clip_norm": 1e9} | options
    config = OptimizerConfig(**given)
    inner, rate = make_optimizer(config, STEPS, params), schedule(config, STEPS)
    return sparse(inner, sparsity, steps=STEPS, rate=rate, model=MODEL, pruned=held)


def run(optimizer: optax.GradientTransformation, params: Any, steps: int = STEPS) -> tuple[Any, Any, Any]:
    """The last parameters and state, and `matrix` and its mask after each step, of a regression on noise."""
    target = jax.random.normal(jax.random.key(1), (6, 12))
    x = jax.random.normal(jax.random.key(2), (6, 8))

    def loss(params):
        hidden = x @ (params["matrix"][...][0] + params["matrix"][...][1])
        rest = params["adapter"][...] - 0.3, params["table"][...], params["scale"][...] - 1
        return jnp.mean(jnp.square(hidden - target)) + sum(jnp.mean(jnp.square(r)) for r in rest)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params: Any = optax.apply_updates(params, updates)
        mask = state.masks["matrix"][...] if isinstance(state, Sparse) and state.masks else None
        return (params, state), (params["matrix"][...], mask)

    begin = params, optimizer.init(params)
    (params, state), seen = jax.jit(lambda begin: jax.lax.scan(step, begin, None, length=steps))(begin)
    return params, state, jax.device_get(seen)


def moments(state: Any) -> list[np.ndarray]:
    """All in the optimizer's state that is as large as `matrix`, but for the mask."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.inner) if leaf.shape == (2, 8, 12)]


@pytest.mark.parametrize(
    ("name", "how"),
    [("adamw", "magnitude"), ("muon", "2:4"), ("lion", "magnitude"), ("adafactor", "2:4")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("adamw", "2:4"), ("muon", "magnitude"), ("lion", "2:4"), ("adafactor", "magnitude"))
    ],
)
def test_what_was_pruned_stays_zero(name, how):
    """In the weights and in the moments, after each of a hundred steps; what began at zero is trained all the same."""
    params = pruned(how)
    zero = np.asarray(params["matrix"][...]) == 0
    assert zero.mean() == 0.5
    after, state, (seen, _) = run(optimizer_of(params, SparsityConfig(), held=True, name=name), params)
    assert not seen[:, zero].any()
    assert seen[-1][~zero].all()
    assert np.abs(seen[-1] - np.asarray(params["matrix"][...]))[~zero].min() > 0
    found = moments(state)
    assert found or name == "adafactor"
    assert all(not moment[zero].any() for moment in found)
    assert all(moment[~zero].all() for moment in found)
    assert np.all(np.asarray(after["adapter"][...]) != 0)
    # Without a mask they come back.
    free, _, (dense, _) = run(optimizer_of(params, SparsityConfig(hold=False), held=True, name=name), params)
    assert dense[-1][zero].all()
    # What is not pruned is trained as without any of this.
    np.testing.assert_allclose(after["table"][...], free["table"][...], rtol=1e-4, atol=1e-6)


def test_nothing_changes_by_default():
    params = pruned("magnitude")
    inner = make_optimizer(OptimizerConfig(), STEPS, params)
    options: Any = {"steps": STEPS, "rate": schedule(OptimizerConfig(), STEPS), "model": MODEL}
    assert sparse(inner, SparsityConfig(), pruned=False, **options) is inner
    assert sparse(inner, SparsityConfig(hold=False), pruned=True, **options) is inner


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_go_along_the_cubic(name):
    """Zhu and Gupta 2017, equation 1; each the smallest of its matrix, and none comes back."""
    config = SparsityConfig(final=0.8, begin=0.1, end=0.6, every=10)
    params = pruned("magnitude")
    begin = np.asarray(params["matrix"][...])
    _, state, (seen, masks) = run(optimizer_of(params, config, name=name), params)
    expected, before = 0.0, begin
    for step in range(STEPS):
        if 10 <= step <= 60 and (step - 10) % 10 == 0:
            expected = 0.8 + (0 - 0.8) * (1 - (step - 10) / 50) ** 3
        count = round(expected * 96)
        assert ((~masks[step]).sum((1, 2)) == count).all(), step
        assert not seen[step][~masks[step]].any()
        for layer in range(2):
            going = ~masks[step][layer]
            if step and (went := going & masks[step - 1][layer]).any():
                assert np.abs(before[layer][went]).max() <= np.abs(before[layer][~going]).min()
        before = seen[step]
    assert not (masks[1:] & ~masks[:-1]).any()
    assert ((seen[-1] == 0).sum((1, 2)) == round(0.8 * 96)).all()
    assert all(not moment[~masks[-1]].any() for moment in moments(state))


def test_rigl_exchanges_as_many_as_it_takes():
    config = SparsityConfig(final=0.75, method="rigl", begin=0.0, end=0.8, every=8)
    params = nnx.state(Parameters())
    _, state, (seen, masks) = run(optimizer_of(params, config), params)
    assert (masks.sum((2, 3)) == 24).all()
    assert not seen[~masks].any()
    changes = [step for step in range(1, STEPS) if (masks[step] != masks[step - 1]).any()]
    assert changes
    assert all(step % 8 == 0 and step < 80 for step in changes)
    assert all(not moment[~masks[-1]].any() for moment in moments(state))
    shares = [float(share_of_swaps(config, jnp.int32(step), STEPS)) for step in (0, 40, 80)]
    np.testing.assert_allclose(shares, [0.3, 0.15, 0.0], atol=1e-6)
    assert [step for step in range(STEPS) if due(config, jnp.int32(step), STEPS)] == list(range(0, 80, 8))


def test_rigl_drops_the_smallest_and_grows_by_gradient():
    """One exchange, against numpy."""
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((6, 10)), rng.standard_normal((6, 10))
    config = SparsityConfig(final=0.5, method="rigl", begin=0.0, end=1.0, every=1, swapped=0.4)
    params: Any = nnx.state(Parameters())
    params["matrix"].set_value(jnp.asarray(w, jnp.float32)[None])
    optimizer = optimizer_of(params, config, name="adamw", warmup_fraction=0, schedule="constant")
    state = optimizer.init(params)
    mask = np.asarray(state.masks["matrix"][...])[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert (mask == (np.abs(w) >= np.sort(np.abs(w).ravel())[30])).all()
    gradient = jax.tree.map(jnp.zeros_like, params)
    gradient["matrix"].set_value(jnp.asarray(g, jnp.float32)[None])
    after = np.asarray(optimizer.update(gradient, state, params)[1].masks["matrix"][...])[0]  # pyright: ignore
    kept = mask & (np.abs(w) > np.sort(np.abs(w)[mask])[11])  # 0.4 of 30 go
    grown = np.where(kept, -1, np.abs(g)) >= np.sort(np.where(kept, -1, np.abs(g)).ravel())[-12]
    np.testing.assert_array_equal(after, kept | grown)


def test_the_formulas():
    config = SparsityConfig(final=0.9, begin=0.2, end=0.7)
    shares = [float(share_of_zeros(config, jnp.int32(step), STEPS)) for step in (0, 20, 45, 70, 99)]
    np.testing.assert_allclose(shares, [0, 0, 0.9 * (1 - 0.5**3), 0.9, 0.9], rtol=1e-5)
    scores = jnp.asarray([[[3.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 5.0]]])
    kept = largest(scores, jnp.asarray([[[2]], [[1]]]))
    np.testing.assert_array_equal(kept, [[[True, False], [True, False]], [[False, False], [False, True]]])


def test_l1_is_soft_thresholding():
    """After the update of the optimizer, by the learning rate times l1; of matrices alone."""
    params = nnx.state(Parameters())
    options: Any = {"warmup_fraction": 0, "schedule": "constant", "weight_decay": 0.0}
    plain, _, (without, _) = run(optimizer_of(params, SparsityConfig(), **options), params, steps=1)
    after, _, (seen, _) = run(optimizer_of(params, SparsityConfig(l1=2.0), **options), params, steps=1)
    expected = np.sign(without[0]) * np.maximum(np.abs(without[0]) - 0.05 * 2, 0)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(seen[0] == 0, expected == 0)
    assert (expected == 0).any()
    np.testing.assert_allclose(after["table"][...], plain["table"][...], rtol=1e-6)


@functools.cache
def built(family: str) -> LanguageModel:
    config = configs.experiment(family).model
    config = dataclasses.replace(config, width=32, layers=max(2, len(config.pattern)), vocab_size=31, groups=None)
    return LanguageModel(config, nnx.Rngs(0))


GROUPS = {"transformer": "heads", "mamba": "channels", "jamba": "experts", "rwkv": "neurons", "xlstm": "heads"}


@pytest.mark.parametrize("family", GROUPS)
def test_units_become_zero_together(family):
    """Those that are zero can be taken out: nothing that the model says changes."""
    model = built(family)
    groups: Any = GROUPS[family]
    params = nnx.state(model, nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def after(strength: float) -> Any:
        config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_fraction=0, weight_decay=0.0)
        optimizer = sparse(
            optax.identity(),
            SparsityConfig(group_lasso=strength, groups=groups),
            steps=10,
            rate=schedule(config, 10),
            model=model.config,
            pruned=False,
        )
        once = jax.jit(lambda p: optax.apply_updates(p, optimizer.update(zeros, optimizer.init(p), p)[0]))
        return once(params)

    weak, strong = after(1e-3), after(1e3)
    shrunk = 0
    for before, some, none in zip(*map(jax.tree.leaves, (params, weak, strong)), strict=True):
        before, some, none = map(np.asarray, (before, some, none))
        if (before == some).all():
            np.testing.assert_array_equal(before, none)
            continue
        shrunk += 1
        changed = none != before
        assert not none[changed].any()
        assert (np.abs(some) <= np.abs(before)).all()
    assert shrunk


def test_a_group_is_shrunk_by_its_norm():
    """Against numpy: the hidden neurons of a feed-forward layer, through all their matrices."""
    model = built("transformer")
    params: Any = nnx.state(model, nnx.Param)
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_fraction=0, weight_decay=0.0)
    sparsity = SparsityConfig(group_lasso=0.3)
    options: Any = {"steps": 10, "rate": schedule(config, 10), "model": model.config, "pruned": False}
    optimizer = sparse(optax.identity(), sparsity, **options)
    updates = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
    after: Any = optax.apply_updates(params, updates)
    of = lambda tree: {n: np.float64(tree["periods"]["blocks"][0]["channel"][n]["weight"][...]) for n in names}  # noqa: E731
    names = [n for n in ("up", "gate", "down") if n in params["periods"]["blocks"][0]["channel"]]
    before, found = of(params), of(after)
    square = sum((w**2).sum(2 if n == "down" else 1) for n, w in before.items())
    count = sum(w.shape[2 if n == "down" else 1] for n, w in before.items())
    factor = np.maximum(0, 1 - 0.5 * 0.3 * np.sqrt(count) / np.sqrt(square))
    assert (factor == 0).any() or (factor < 1).all()
    for n, w in before.items():
        expected = w * (factor[:, :, None] if n == "down" else factor[:, None, :])
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-6)


def zeros(folder) -> dict[str, np.ndarray]:
    """Of each matrix."""
    model = load(folder).model()
    return {place.name: np.asarray(place.value[...]) == 0 for place in places(model) if place.kind == "matrix"}


@pytest.mark.parametrize("method", ["magnitude", pytest.param("rigl", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_its_masks(experiment, tmp_path, method):
    """Bit for bit, in the middle of pruning, or of what RigL exchanges."""
    loop = dataclasses.replace(experiment.loop, steps=12, checkpoint_every=6, eval_every=12)
    small = dataclasses.replace(experiment.model, layers=1, pattern=experiment.model.pattern[:1])
    sparsity = SparsityConfig(final=0.8, method=method, every=2)
    asked = dataclasses.replace(experiment, model=small, sparsity=sparsity, loop=loop)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(asked, whole)
    assert train(asked, parts, max_steps=6) is None
    train(asked, parts)
    for one, other in zip(*(jax.tree.leaves(load(each).params) for each in (whole, parts)), strict=True):
        np.testing.assert_array_equal(one, other)
    for name, zero in zeros(whole).items():
        each = zero.reshape(-1, zero.shape[-2] * zero.shape[-1])
        np.testing.assert_allclose(each.mean(1), 0.8, atol=1 / each.shape[1], err_msg=name)


def test_prune_retrain_quantize(trained, tmp_path):
    """A chain of runs: zeros last to the end, and the values are those of QAT."""
    options = ["--loop.steps", "4", "--loop.checkpoint-every", "2", "--optimizer.learning-rate", "0.01"]
    sparse, tuned, small = tmp_path / "sparse", tmp_path / "tuned", tmp_path / "small"
    assert main(["finetune", str(trained), "magnitude-2:4", *options, "--out", str(sparse)]) == 0
    zero = zeros(sparse)
    assert all(each.reshape(-1, each.shape[-2] * each.shape[-1]).mean() == 0.5 for each in zero.values())
    assert main(["finetune", str(sparse), "qat-int4", *options, "--out", str(tuned)]) == 0
    assert main(["compress", str(tuned), "int4", "--out", str(small)]) == 0
    before, after = load(tuned).model(), load(small).model()
    rounded = {path: held for path, held in weights(after).items() if isinstance(held, Quantized)}
    assert rounded
    for path, held in rounded.items():
        values = jax.jit(materialize)(held)
        np.testing.assert_array_equal(values, jax.jit(materialize)(weights(before)[path]))
        name = ".".join(map(str, path))
        if name in zero:
            assert not np.asarray(values)[zero[name]].any()
    assert {name: each.sum() for name, each in zeros(tuned).items()} == {n: each.sum() for n, each in zero.items()}


@pytest.mark.parametrize(
    "wrong",
    [{"final": 1.0}, {"begin": 0.5, "end": 0.4}, {"end": 1.5}, {"every": 0}, {"l1": -1.0}, {"swapped": 1.5}],
)
def test_impossible_values_name_the_field(wrong):
    with pytest.raises(UserError, match=rf"sparsity\.({'|'.join(wrong)})"):
        SparsityConfig(**wrong)


def test_what_does_not_go_together_is_refused(experiment):
    loop = dataclasses.replace(experiment.loop, ema=0.9)
    with pytest.raises(UserError, match="has not the zeros that sparsity makes"):
        dataclasses.replace(experiment, loop=loop, sparsity=SparsityConfig(final=0.5))
    params = nnx.state(Parameters())
    with pytest.raises(UserError, match=r"sparsity\.groups experts: this model has none"):
        optimizer_of(params, SparsityConfig(group_lasso=1.0, groups="experts"))
