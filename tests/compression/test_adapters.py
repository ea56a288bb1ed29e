"""Adapters on each of the five families: what they train, what they leave, what they stand for."""

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
from phyla.compression.adapters import Target, principal, targets
from phyla.compression.compress import Step, abstract, compress
from phyla.compression.matrices import dotted, weights
from phyla.compression.recipes import parse
from phyla.models.adapted import IA3, Adapter, DoRA, LoRA, PiSSA
from phyla.models.config import ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.layers import ExpertLinear
from phyla.models.weights import materialize, parameter, trainable
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
    state: Any = nnx.state(model, *what)
    for _, variable in nnx.to_flat_state(state):
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
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


FAMILIES = configs.SMALL
METHODS = (
    *("lora-r2", "rslora-r2", "dora-r2", "pissa-r2", "nf4+lora-r2", "ia3", "houlsby-2", "pfeiffer-2", "bitfit"),
    *("state", "prefix-3", "prefix-3-mlp", "prompt-3", "ptuning-3", "intrinsic-9", "intrinsic-9-fastfood"),
    *("qat-int8", "qat-int4", "qat-ternary", "qat-nf4", "qat-w8a8", "lsq-int4", "lsq-int2-tensor"),
)
"""Every adapter and every kind of QAT."""
ELSEWHERE = {"prefix-3": "transformer", "prefix-3-mlp": "transformer", "state": "rwkv"}
QUICK = [(family, "lora-r2") for family in FAMILIES]
QUICK += [(ELSEWHERE.get(name, "mamba"), name) for name in METHODS if name != "lora-r2"]
SLOW = [(family, name) for family in FAMILIES for name in METHODS if (family, name) not in QUICK]
NOT = {("transformer", "state"): "no layer of this model has a state", ("transformer", "bitfit"): "it has no biases"}
NOT |= {(family, "prefix-3-mlp"): "no layer of this model has keys and values" for family in ("mamba", "rwkv", "xlstm")}
UNMOVED = ("memory_1",)
"""mLSTM's normaliser: at zero it is below its bound, and no answer depends on it."""


@pytest.mark.parametrize(("family", "name"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_steps_train_what_is_new_and_nothing_else(family, name):
    if (family, name) in NOT:
        with pytest.raises(UserError, match=NOT[family, name]):
            abstract(config(family), parse(name))
        return
    graphdef, params, frozen = split(adapted(family, name).model)
    begin, before = leaves(params), leaves(frozen)
    optimizer = optax.adam(1e-2)
    state = initial_state(params, optimizer, LoopConfig(steps=2))._replace(frozen=(frozen, NOTHING))
    run = jax.jit(make_step(graphdef, functools.partial(next_token, chunk=64), optimizer, LoopConfig(steps=2)))
    batch = {"tokens": TOKENS, "segment_ids": jnp.ones_like(TOKENS).at[1, 6:].set(2)}
    state, first = run(state, batch)
    state, second = run(state, batch)
    assert float(first.skipped) == float(second.skipped) == 0
    assert np.isfinite(float(second.loss))
    # In so few bits two steps may go beyond.
    assert float(second.loss) < float(first.loss) or "ternary" in name or "int2" in name
    # Every parameter of the adapter is moved by the two steps (LoRA's A, behind a B of zeros, by the second).
    after = leaves(state.params)
    still = [each for each in begin if np.array_equal(begin[each], after[each])]
    assert not [each for each in still if not any(known in each for known in UNMOVED)], still
    # What is frozen is what it was, to the bit; of the base, all is there.
    for path, leaf in leaves(state.frozen[0]).items():
        np.testing.assert_array_equal(leaf, before[path])
    if name not in ("bitfit", "nf4+lora-r2"):
        held = {leaf.tobytes() for leaf in (*before.values(), *begin.values())}
        assert all(leaf.tobytes() in held for leaf in leaves(nnx.state(built(family))).values())
    # The optimizer knows of nothing else.
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.dtype == jnp.float32)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "family",
    [each if each in ("transformer", "mamba") else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES],
)
def test_trainable_parameters_are_what_the_formula_says(family):
    """Of every matrix r (in + out); nothing is computed."""

    def count(name: str) -> int:
        model = jax.eval_shape(lambda: compress(LanguageModel(config(family), nnx.Rngs(0)), parse(name))[-1].model)
        return sum(leaf.size for leaf in jax.tree.leaves(split(model)[1]))

    found = [each for each in targets(LanguageModel(config(family), nnx.Rngs(0))) if each.usual]
    of = lambda size: sum(int(np.prod(each.stack, dtype=int)) * size(*each.held.shape[-2:]) for each in found)  # noqa: E731
    able = lambda K, N: 2 * (K + N) < K * N  # noqa: E731
    assert count("lora-r2") == count("pissa-r2") == count("rslora-r2") == of(lambda K, N: able(K, N) * 2 * (K + N))
    assert count("dora-r2") == of(lambda K, N: able(K, N) * (2 * (K + N) + N))
    width = config(family).width
    behind = [each for each in found if each.returns]
    assert count("houlsby-3") == sum(int(np.prod(each.stack, dtype=int)) * 6 * width for each in behind)
    assert len(behind) == {"mamba": 1, "jamba": 8, "rwkv": 4}.get(family, 2)


@pytest.mark.parametrize(
    ("family", "name"),
    [("jamba", "dora-r2"), ("rwkv", "ia3"), ("xlstm", "houlsby-2")]
    + [
        pytest.param(family, name, marks=pytest.mark.slow)
        for family in FAMILIES
        for name in ("lora-r2", "dora-r2", "pissa-r2", "ia3", "houlsby-2", "pfeiffer-2", "nf4+lora-r2", "nf4+pissa-r2")
    ],
)
def test_it_begins_as_the_base_and_is_merged_to_the_same_answers(family, name):
    step = adapted(family, name)
    base = compress(built(family), parse("nf4"))[-1].model if name.startswith("nf4") else built(family)
    close = {"atol": 1e-5 * np.abs(logits(base)).max(), "rtol": 1e-5}
    np.testing.assert_allclose(logits(step.model), logits(base), **close)
    model = disturbed(nnx.clone(step.model), trainable)
    answers = logits(model)
    assert np.abs(answers - logits(base)).max() > 100 * close["atol"]
    if "houlsby" in name or "pfeiffer" in name:
        with pytest.raises(UserError, match="is no matrix and cannot be merged"):
            compress(model, parse("merge"))
        return
    (merged,) = compress(model, parse("merge"))
    np.testing.assert_allclose(logits(merged.model), answers, **close)
    assert not any(isinstance(each, Adapter) for each in weights(merged.model).values())
    assert bool(merged.note) == name.startswith("nf4")
    dense = {path: each.get_metadata() for path, each in nnx.to_flat_state(nnx.state(built(family)))}
    for path, each in nnx.to_flat_state(nnx.state(merged.model, nnx.Param)):
        assert each.get_metadata()["trainable"]
        assert each.get_metadata()["axes"] == dense[path]["axes"]


K, N, RANK = 24, 10, 3


def one(name: str, *, experts: int = 0, seed: int = 0):
    """An adapter on a matrix, disturbed, and its arrays in float64."""
    rng = np.random.default_rng(seed)
    shape = (experts, K, N) if experts else (K, N)
    axes = ("experts", "embed", "mlp")[0 if experts else 1 :]
    dense = parameter(lambda *_: jnp.asarray(rng.standard_normal(shape), jnp.float32), shape, axes, nnx.Rngs(0))
    rule: Any = parse(name)[0]
    target = Target(("weight",), dense, axes, True, True)
    weight = rule.wrap(target, jax.random.key(0))
    W = np.asarray(dense[...], np.float64)
    dense.set_metadata(trainable=False)
    begin = {part: np.asarray(getattr(weight, part)[...], np.float64) for part in ("A", "B") if hasattr(weight, part)}
    for _, variable in nnx.to_flat_state(nnx.state(weight, trainable)):
        variable[...] = variable[...] + jnp.asarray(0.3 * rng.standard_normal(variable.shape), jnp.float32)
    return weight, W, begin


def expected(weight, W: np.ndarray, begin: dict) -> np.ndarray:
    """What it stands for, in float64, from the papers' equations."""
    if isinstance(weight, IA3):
        factor = np.asarray(weight.factor[...], np.float64)
        return W * (factor[..., None] if weight.inputs else factor[..., None, :])
    A, B = (np.asarray(each[...], np.float64) for each in (weight.A, weight.B))
    if isinstance(weight, PiSSA):
        return W + weight.scale * (A @ B - begin["A"] @ begin["B"])
    V = W + weight.scale * A @ B
    if isinstance(weight, DoRA):
        m = np.asarray(weight.magnitude[...], np.float64)[..., None, :]
        return m * V / np.linalg.norm(V, axis=-2, keepdims=True)
    return V


LOW_RANK = ("lora-r3", "lora-r3-a16", "rslora-r3", "dora-r3", "pissa-r3", "ia3")


@pytest.mark.parametrize("name", LOW_RANK)
def test_against_float64(name):
    weight, W, begin = one(name)
    V = expected(weight, W, begin)
    x, g = np.random.default_rng(1).standard_normal((2, 4, K)), np.random.default_rng(2).standard_normal((4, N))
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(weight.matmul(jnp.asarray(x, jnp.float32)), x @ V, **close)
    np.testing.assert_allclose(materialize(weight), V, **close)
    rows = np.array([[3, 3], [0, 23]])
    np.testing.assert_allclose(weight.take(jnp.asarray(rows)), V[rows], **close)
    np.testing.assert_allclose(weight.matmul_transposed(jnp.asarray(g, jnp.float32)), g @ V.T, **close)
    scales = {"lora-r3": 8 / 3, "lora-r3-a16": 16 / 3, "rslora-r3": 8 / 3**0.5}
    if name in scales:
        assert weight.scale == pytest.approx(scales[name])
        assert np.abs(begin["A"]).max() <= K**-0.5
        assert np.abs(begin["A"]).max() > 0.9 * K**-0.5
        assert not begin["B"].any()


@pytest.mark.parametrize("name", [*LOW_RANK, "houlsby-3"])
def test_experts_are_adapted_each_by_itself(name):
    """Many rows and few, against one matrix at a time."""
    weight, W, begin = one(name, experts=3)
    x = np.random.default_rng(1).standard_normal((6, K)).astype(np.float32)
    sizes, expert = jnp.asarray([2, 0, 3]), np.array([0, 0, 2, 2, 2])
    holder = ExpertLinear(3, (K, N), ("embed", "mlp"), nnx.Rngs(0))
    holder.weight = weight
    found, few = holder(jnp.asarray(x), sizes), holder.chosen(jnp.asarray(x[:5]), jnp.asarray(expert))
    if name == "houlsby-3":
        y = np.einsum("nk,nko->no", x[:5], W[expert])
        down, up = (np.asarray(each[...], np.float64)[expert] for each in (weight.down, weight.up))
        hidden = np.einsum("no,nor->nr", y, down)
        right = y + np.einsum("nr,nro->no", hidden / (1 + np.exp(-hidden)), up)
    else:
        right = np.einsum("nk,nko->no", x[:5], expected(weight, W, begin)[expert])
    np.testing.assert_allclose(found[:5], right, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[5:], 0)
    np.testing.assert_allclose(few, right, rtol=1e-4, atol=1e-4)


def test_dora_counts_the_norm_as_a_constant():
    """The gradients of A, B and the magnitude, in float64 (section 4.3)."""
    weight, W, _ = one("dora-r3")
    x, c = (np.random.default_rng(i).standard_normal(shape) for i, shape in ((1, (5, K)), (2, (5, N))))
    graphdef, own, rest = nnx.split(weight, trainable, ...)

    def loss(own):
        return jnp.sum(nnx.merge(graphdef, own, rest).matmul(jnp.asarray(x, jnp.float32)) * c.astype(np.float32))

    found = {path[-1]: np.asarray(each[...]) for path, each in nnx.to_flat_state(jax.grad(loss)(own))}
    A, B, m = (np.asarray(each[...], np.float64) for each in (weight.A, weight.B, weight.magnitude))
    V = W + weight.scale * A @ B
    norm = np.linalg.norm(V, axis=0)
    of_V = x.T @ (c * m / norm)
    np.testing.assert_allclose(found["magnitude"], np.sum(c * (x @ V), 0) / norm, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["A"], weight.scale * of_V @ B.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["B"], weight.scale * A.T @ of_V, rtol=1e-3, atol=1e-3)


def test_pissa_begins_with_the_best_matrix_of_its_rank():
    W = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    A, B = (np.asarray(each, np.float64) for each in principal(jnp.asarray(W), RANK, 2.0))
    U, S, V = np.linalg.svd(W.astype(np.float64))
    np.testing.assert_allclose(2 * A @ B, U[:, :RANK] * S[:RANK] @ V[:RANK], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=1), rtol=1e-4)


def test_qlora_makes_no_dense_copy(optimised):
    """In a training step XLA's temporaries are smaller than one of the dense matrices."""
    width = 1024
    attention = configs.experiment("transformer").model
    model = dataclasses.replace(attention, width=width, layers=1, vocab_size=VOCABULARY)
    for name, fits in (("nf4+lora-r4", True), ("nf4+dora-r4", True)):
        found = abstract(model, parse(f"{name}@(up|gate|down)"))
        graphdef, params, frozen = split(found)

        def loss(params, frozen, graphdef=graphdef):
            return jnp.sum(nnx.merge(graphdef, params, frozen)(TOKENS[:1, :4])[0])

        memory = jax.jit(jax.grad(loss)).lower(params, frozen).compile().memory_analysis()
        assert memory is not None
        assert (memory.temp_size_in_bytes < 4 * width * round(width * 8 / 3)) == fits


@pytest.mark.parametrize(
    ("family", "name", "error"),
    [
        ("transformer", "lora-r8@mixer.z", "'mixer.z' is in no path of a matrix; nearest: periods"),
        ("mamba", "lora-r999@in_proj", "stays as it is .of 16 × 64: A and B of rank 999 would be as large"),
        ("transformer", "lora-r0", "the rank must be at least 1; nearest: lora-r1"),
        ("transformer", "lora-r8-a0", "α must be positive"),
        ("transformer", "loar-r8", "no method 'loar-r8'; nearest: lora-r8"),
        ("transformer", "merge", "there is no adapter in this model"),
        ("transformer", "bitfit@nothing", "'nothing' is in no parameter's path"),
        ("mamba", "state@mixer", "is for the whole model"),
        ("mamba", "prompt-0", "nearest: prompt-1"),
        ("mamba", "state+prompt-2", "has a learned beginning already"),
        ("mamba", "lora-r2+int8@in_proj", "or it is part of one: merge it first"),
    ],
)
def test_what_cannot_be_adapted_is_an_error(family, name, error):
    with pytest.raises(UserError, match=error):
        abstract(config(family), parse(name))


def test_adapters_choose_by_path_and_by_default():
    """Heads, tables and `precise` matrices if they are named; weights of few bits as dense ones."""
    base = LanguageModel(config("jamba"), nnx.Rngs(0))
    rounded = compress(base, parse("int8"))[-1].model
    for model in (base, rounded):
        found = jax.eval_shape(lambda model=model: compress(model, parse("lora-r2"))[-1].model)
        names = {dotted(path) for path, each in weights(found).items() if isinstance(each, LoRA)}
        assert names == {each.name for each in targets(base) if each.usual and min(each.held.shape[-2:]) > 2}
        assert not [name for name in names if "router" in name or "embedding" in name or "dt_proj" in name]
    named = compress(base, parse("lora-r1@embedding|router"))[0]
    assert set(named.changed) == {"embedding.weight", *(f"periods.blocks.{i}.channel.router.weight" for i in (1, 3))}
    np.testing.assert_allclose(logits(named.model), logits(base), atol=1e-5)
