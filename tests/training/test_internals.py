"""What is learned from the inside of a teacher: the formulas against float64, and every term for every family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla.models import sizes
from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mlstm import MLSTMConfig
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mlp import MLPConfig
from phyla.models.moe import MoEConfig
from phyla.training.config import DistillationConfig
from phyla.training.distillation import Distillation
from phyla.training.internals import (
    block_distance,
    check,
    mixing_distance,
    over_layers,
    relation_divergence,
    score_distance,
)
from phyla.training.objectives import next_tokens

B, T, D = 2, 6, 8
SEGMENTS = jnp.asarray([[1] * T, [1, 1, 2, 2, 2, 0]])
SEEN = (np.asarray(SEGMENTS)[:, :, None] == np.asarray(SEGMENTS)[:, None]) & np.tril(np.ones((T, T), bool))
RWKV = RWKV7Config(head_dim=4, decay_rank=2, rate_rank=2, value_rank=2, gate_rank=2, value_residual=False)


def config_of(*mixers: LayerConfig, **fields: Any) -> ModelConfig:
    pattern = tuple(BlockConfig(mixer=mixer, channel=MLPConfig(expand=2.0)) for mixer in mixers)
    return ModelConfig(**{"width": D, "layers": 2, "pattern": pattern, "vocab_size": 31} | fields)


TEACHER = config_of(AttentionConfig(heads=2, head_dim=4))
MIXED = ModelConfig(
    width=D,
    layers=2,
    pattern=(
        BlockConfig(mixer=MambaConfig(state=2), channel=MLPConfig()),
        BlockConfig(mixer=AttentionConfig(heads=2), channel=MoEConfig(experts=2, top_k=1)),
    ),
    vocab_size=31,
)
FAMILIES = {
    "transformer": config_of(AttentionConfig(heads=2, head_dim=4, positions="none")),
    "mamba": config_of(MambaConfig(state=2)),
    "mamba2": config_of(Mamba2Config(expand=1.0, head_dim=4, state=4)),
    "jamba": MIXED,
    "rwkv": config_of(
        RWKV,
        prefix=(BlockConfig(mixer=RWKV, channel=RWKV7ChannelConfig()),),
        norm="layernorm",
        embedding_norm=True,
    ),
    "xlstm": config_of(MLSTMConfig(heads=2, input_bias=0.0)),
}


@functools.cache
def made(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Stirred, so that nothing is at its usual zero."""

    def build() -> nnx.State:
        params = nnx.split(LanguageModel(config, nnx.Rngs(seed)))[1]
        return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(seed), x.shape), params)

    return nnx.split(sizes.abstract(config))[0], jax.jit(build)()


def model_of(config: ModelConfig, seed: int) -> LanguageModel:
    return nnx.merge(*made(config, seed))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(np.where(SEEN[:, None], x, -np.inf) - np.where(SEEN[:, None], x, -np.inf).max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def products(a: Any, b: Any, heads: int) -> np.ndarray:
    a, b = (np.asarray(x, np.float64).reshape(B, T, heads, -1) for x in (a, b))
    return np.einsum("btnh,bsnh->bnts", a, b) / np.sqrt(a.shape[-1])


def test_scores_and_relations_in_float64():
    """Heads of other sizes; of another number where both are divided anew."""
    mine = model_of(config_of(AttentionConfig(heads=2, kv_heads=1, head_dim=2), width=4), 0)
    its = model_of(TEACHER, 1)
    keys = jax.random.split(jax.random.key(0))
    streams = tuple(
        jax.random.normal(key, (B, T, model.config.width)) for key, model in zip(keys, (mine, its), strict=True)
    )

    @jax.jit
    def found(mine, its, x, y):
        blocks = (mine.block(1), x), (its.block(0), y)
        both: list[Any] = [block.mixer.projected(block.mixer_input(z), SEGMENTS) for block, z in blocks]
        v1 = relation_divergence(*blocks, SEGMENTS, kinds=("qk", "vv"), heads=None)
        v2 = relation_divergence(*blocks, SEGMENTS, kinds=("qq", "kk", "vv"), heads=4)
        return both, score_distance(*blocks, SEGMENTS), v1, v2

    ((q, k, v), (q_, k_, v_)), scores, v1, v2 = found(mine, its, *streams)
    square = np.square(products(q, k, 2) - products(q_, k_, 2)) * SEEN[:, None]
    np.testing.assert_allclose(scores, (square.sum(-1) / SEEN.sum(-1)[:, None]).mean(1), rtol=1e-4)

    def divergence(mine, its):
        p, q = softmax(its), softmax(mine)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(SEEN[:, None], p * np.log(p / q), 0).sum(-1).mean(1)

    expected = divergence(products(q, k, 2), products(q_, k_, 2)) + divergence(products(v, v, 2), products(v_, v_, 2))
    np.testing.assert_allclose(v1, expected, rtol=1e-4, atol=1e-6)
    pairs = (q, q_), (k, k_), (v, v_)
    expected = sum(divergence(products(a, a, 4), products(b, b, 4)) for a, b in pairs)
    np.testing.assert_allclose(v2, expected, rtol=1e-4, atol=1e-6)


def test_mixing_matrices_in_float64():
    """Σ over layers of the mean over heads of each row's squared distance: summed, the squared Frobenius norm.

    Prefix and patterns of the two differ, so that their layers meet in different ways, and ALBERT's layers are one.
    """
    mamba2, attention = FAMILIES["mamba2"].pattern, TEACHER.pattern
    student = dataclasses.replace(FAMILIES["mamba2"], prefix=mamba2, layers=7, pattern=mamba2 + attention)
    teacher = dataclasses.replace(TEACHER, layers=7, groups=1)
    mine, its = model_of(student, 0), model_of(teacher, 1)
    streams = jax.random.normal(jax.random.key(3), (8, B, T, D))
    every = tuple((i, i) for i in range(1, 8))

    @jax.jit
    def found(mine, its, streams):
        matrices = [
            [block.mixer.mixing(block.mixer_input(streams[i]), SEGMENTS) for block in (mine.block(i), its.block(i))]
            for i in range(7)
        ]
        return over_layers(mixing_distance, every, (mine, streams), (its, streams), SEGMENTS), matrices

    distance, matrices = found(mine, its, streams)
    expected = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in matrices]
    norms = sum(np.square(np.linalg.norm(each, axis=(-2, -1))).mean(1) for each in expected)
    np.testing.assert_allclose(np.asarray(distance).sum(1), norms, rtol=1e-5)
    np.testing.assert_allclose(distance, sum(np.square(each).sum(-1).mean(1) for each in expected), rtol=1e-5)


def test_programs_do_not_grow_with_depth():
    """Of the terms that compare layer with layer."""
    config = DistillationConfig(mixing=1.0, attention=1.0, relations=1.0, blocks=1.0)

    def operations(layers: int) -> int:
        deep = dataclasses.replace(TEACHER, layers=layers)
        student = nnx.split(sizes.abstract(deep))
        objective = Distillation(config, sizes.abstract(deep), deep, next_tokens, chunk=64, rngs=nnx.Rngs(0))
        ask = nnx.split(objective)
        batch = {"tokens": jnp.zeros((B, T + 1), int), "segment_ids": jnp.ones((B, T + 1), int)}

        def loss(params, asked):
            model, objective = nnx.merge(student[0], params), nnx.merge(ask[0], asked)
            return objective(model, batch, jax.random.key(0)).total

        return str(jax.make_jaxpr(jax.grad(loss))(student[1], ask[1])).count(" = ")

    assert operations(12) == operations(4)


def test_blocks_of_shared_layers():
    """`blocks` is zero of a student that is its teacher, though its layers are one."""
    shared = model_of(dataclasses.replace(TEACHER, layers=4, groups=2), 0)
    tokens = jax.random.randint(jax.random.key(0), (B, T), 0, 31)
    streams = jax.jit(lambda model: model.forward(tokens, segment_ids=SEGMENTS, layers=True).layers)(shared)
    np.testing.assert_allclose(jax.jit(block_distance)(shared, streams, SEGMENTS), 0, atol=1e-10)
    assert np.all(jax.jit(block_distance)(shared, streams + 1.0, SEGMENTS) > 1e-3)


@pytest.mark.parametrize(
    "family",
    [name if name in ("transformer", "xlstm") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_every_term_of_every_family_falls(family):
    """Each is finite, pulls at the student by itself, and is less after some steps down the sum of all."""
    config = FAMILIES[family]
    terms: dict[str, Any] = {"cosine": 1.0, "hidden": 1.0, "embedding": 1.0, "blocks": 1.0}
    if all(block.mixer.mixing_heads(config) for block in config.blocks):
        terms["mixing"] = 1.0
    if family == "transformer":
        terms |= {"attention": 1.0, "relations": 1.0}
    teacher = made(TEACHER, 1)
    graphdef, params = made(config, 0)
    objective = Distillation(
        DistillationConfig(**terms), nnx.merge(*teacher), config, next_tokens, chunk=64, rngs=nnx.Rngs(0)
    )
    ask = nnx.split(objective)
    tokens = jax.random.randint(jax.random.key(0), (B, T + 1), 0, 31)
    batch = {"tokens": tokens, "segment_ids": jnp.pad(SEGMENTS, ((0, 0), (0, 1)), mode="edge")}

    @jax.jit
    def descended(params, own, batch):
        def values(params):
            loss = nnx.merge(ask[0], own)(nnx.merge(graphdef, params), batch, jax.random.key(0))
            named = {name: loss.metrics[name] / loss.weight for name in ("soft", *terms)}
            named |= {"hard": loss.total / loss.weight}
            return named, (named, loss.total + loss.penalty)

        def step(params, _):
            pulls, (now, total) = jax.jacrev(values, has_aux=True)(params)
            norms = {name: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(pull))) for name, pull in pulls.items()}
            whole = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), pulls.values())
            size = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(whole)))
            return jax.tree.map(lambda x, g: x - 0.05 * g / jnp.maximum(size, 1), params, whole), (now, norms, total)

        return jax.lax.scan(step, params, length=12)[1]

    values, norms, total = descended(params, ask[1], batch)
    assert set(values) == {"hard", "soft", *terms}
    for name, value in values.items():
        assert np.isfinite(value).all(), name
        assert norms[name][0] > 1e-4, name
    assert np.isfinite(total).all()
    assert sum(value[-1] for value in values.values()) < 0.95 * sum(value[0] for value in values.values())
    assert total[-1] < total[0]


@pytest.mark.parametrize(
    ("student", "teacher", "fields", "said"),
    [
        ("mamba", TEACHER, {"mixing": 1.0}, r"Mamba \(layer 1 of the student\) has no mixing matrix for each head"),
        ("mamba2", MIXED, {"mixing": 1.0}, r"Mamba \(layer 1 of the teacher\) has no mixing matrix"),
        ("mamba", TEACHER, {"attention": 1.0}, "between layers of attention; layer 1 of the student has none"),
        ("transformer", MIXED, {"attention": 1.0}, "layer 1 of the teacher has none"),
        ("rwkv", TEACHER, {"relations": 1.0}, "layer 2 of the student has none"),
    ],
)
def test_what_has_no_matrices_is_refused(student, teacher, fields, said):
    with pytest.raises(UserError, match=said):
        check(DistillationConfig(**fields), FAMILIES[student], teacher)


def test_heads_that_do_not_fit_are_refused():
    """Of another number: MiniLM's relations can be divided anew, attention's scores and mixing matrices cannot."""
    student = config_of(AttentionConfig(heads=4, head_dim=2))
    for term, said in (
        ("mixing", "needs the teacher's number of heads: 2 in layer 1, not 4"),
        ("attention", "needs the teacher's number of heads, 2, not 4$"),
        ("relations", "needs the teacher's number of heads, 2, not 4, or distillation.relation_heads"),
    ):
        with pytest.raises(UserError, match=said):
            check(dataclasses.replace(DistillationConfig(), **{term: 1.0}), student, TEACHER)
    check(DistillationConfig(relations=1.0, relation_heads=8), student, TEACHER)
    with pytest.raises(UserError, match="relation_heads 3 does not divide the width of all heads 8; nearest: 2"):
        check(DistillationConfig(relations=1.0, relation_heads=3), student, TEACHER)
    with pytest.raises(UserError, match=r"distillation.mixing needs the teacher's width and layers: model.width 8"):
        check(DistillationConfig(mixing=1.0), config_of(AttentionConfig(heads=2), width=16), TEACHER)
