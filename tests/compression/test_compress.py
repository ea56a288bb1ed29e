"""Every method on each of the five families, against numpy, and through the model that uses the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import norm

from phyla import configs
from phyla.compression.calibrate import moments
from phyla.compression.compress import abstract, compress
from phyla.compression.matrices import dotted, places, replace, weights
from phyla.compression.recipes import METHODS, parse
from phyla.kernels.quantized_matmul.ggml import KINDS, fitting
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.mlstm import MLSTMBlockConfig
from phyla.models.quantized import Quantized
from phyla.models.weights import Weight, materialize, parameter

gguf = pytest.importorskip("gguf")


ROUNDED = ("int8", "int4", "int4-g8", "nf4", "float8")


MORE = {
    "transformer": "int3-g8",
    "mamba": "int4-g8-asym",
    "jamba": "q8_0",
    "rwkv": "int2-g8",
    "xlstm": "int8-tensor",
}
"""Others, of which a family has one and slow tests all."""


TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, 61)


def config(family: str) -> ModelConfig:
    """The small experiment's model, tiny; its tables are not tied where the family's are not everywhere."""
    model = configs.experiment(family).model
    layers = max(2, len(model.pattern))
    return dataclasses.replace(
        model, width=32, layers=layers, vocab_size=61, groups=None, tie_embeddings=family != "xlstm"
    )


@functools.cache
def built(family: str, groups: int | None = None) -> LanguageModel:
    """With random values wherever the initialisation has zeros."""
    model = LanguageModel(dataclasses.replace(config(family), groups=groups), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable[...] = np.asarray(variable[...]) + 0.1 * rng.standard_normal(variable.shape, np.float32)
    return model


@functools.cache
def logits_of(graphdef: nnx.GraphDef):
    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(TOKENS)[0])

    return logits


def logits(model: LanguageModel) -> np.ndarray:
    graphdef, params = nnx.split(model)
    return np.asarray(logits_of(graphdef)(params))


def dense(model: LanguageModel) -> LanguageModel:
    """Ordinary parameters of the values that compressed ones stand for."""
    model = nnx.clone(model)
    original = {place.path: place.value for place in places(LanguageModel(model.config, nnx.Rngs(0)))}
    for path, weight in weights(model).items():
        if isinstance(weight, Weight):
            found = {k: v for k, v in original[path].get_metadata().items() if k != "out_sharding"}
            axes = found.pop("axes")
            kept = {k: found[k] for k in ("weight_decay", "matrix", "learning_rate", "share", "precise")}
            value = jax.jit(materialize)(weight)
            replace(model, path, parameter(lambda *_, v=value: v, value.shape, axes, nnx.Rngs(0), **kept))
    return model


def values(model: LanguageModel) -> dict[str, np.ndarray]:
    return {dotted(path): np.asarray(jax.jit(materialize)(weight)) for path, weight in weights(model).items()}


def rounded(W: np.ndarray, name: str) -> np.ndarray:
    """A matrix [K, N] after rounding to nearest, in float64, one column after another."""
    K, N = W.shape
    if name == "nf4":
        return double_quantized(W.astype(np.float64))
    if name in KINDS:
        kind = gguf.GGMLQuantizationType[str(fitting(name, K)).upper()]
        return gguf.dequantize(gguf.quantize(np.ascontiguousarray(W.T), kind), kind).T
    if name.endswith("-tensor"):
        return rounded(W.reshape(-1, 1), name.removesuffix("-tensor")).reshape(W.shape)
    name, asymmetric = name.removesuffix("-asym"), name.endswith("-asym")
    group = int(name.partition("-g")[2] or K)
    out = np.zeros((K, N))
    for n in range(N):
        for k in range(0, K, group):
            w = W[k : k + group, n].astype(np.float64)
            most = np.abs(w).max()
            if name == "float8":
                out[k : k + group, n] = (
                    np.float32(w / (most / 448)).astype(jnp.float8_e4m3fn).astype(float) * most / 448
                )
            elif asymmetric:
                levels = 2 ** int(name[3]) - 1
                low = min(w.min(), 0)
                step = (max(w.max(), 0) - low) / levels
                zero = np.round(-low / step)
                out[k : k + group, n] = (np.clip(np.round(w / step) + zero, 0, levels) - zero) * step
            else:
                step = most / (2 ** (int(name[3]) - 1) - 1)
                out[k : k + group, n] = np.round(w / step) * step
    return out


@functools.cache
def quantiles() -> np.ndarray:
    """NF4's sixteen numbers from the normal distribution (QLoRA, appendix E)."""
    side = lambda n: np.asarray(norm.ppf(jnp.linspace(0.9677083, 0.5, n)[:-1]), np.float64)  # noqa: E731
    found = np.sort(np.concatenate([side(9), [0.0], -side(8)]))
    return found / found.max()


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 numbers of an 8-bit float with a moving exponent (Dettmers 2016)."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        found += [*middles, *-middles]
    return np.sort(found)


def double_quantized(W: np.ndarray) -> np.ndarray:
    (K, N), book, scale_book = W.shape, quantiles(), dynamic_map()
    G = -(-K // 64)
    blocks = np.pad(W, ((0, -K % 64), (0, 0))).T.reshape(N * G, 64)
    scale = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / scale[:, None, None] - book).argmin(-1)
    centred = scale - scale.mean()
    for i in range(0, len(scale), 256):
        part = slice(i, i + 256)
        most = np.abs(centred[part]).max()
        centred[part] = scale_book[np.abs(centred[part, None] / most - scale_book).argmin(-1)] * most
    return (book[codes] * (centred + scale.mean())[:, None]).reshape(N, G * 64)[:, :K].T


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, method) for family in configs.SMALL for method in (*ROUNDED, MORE[family])),
        *(
            pytest.param(family, method, marks=pytest.mark.slow)
            for family in configs.SMALL
            for method in (*MORE.values(), "q4_k", "q6_k", "float8-tensor", "int2-asym")
            if method != MORE[family]
        ),
    ],
)
def test_rounding(family, method):
    """Each matrix of each stack is rounded by itself; the rest keep their bits; the given model is not touched."""
    before = values(built(family))
    (step,) = compress(built(family), parse(method))
    after = values(step.model)
    assert step.changed
    for name, W in before.items():
        if name in step.left:
            np.testing.assert_array_equal(after[name], W)
            continue
        table = name == "embedding.weight"
        matrices, found = (
            (a.T if table else a).reshape(-1, *(a.T if table else a).shape[-2:]) for a in (W, after[name])
        )
        for matrix, other in zip(matrices, found, strict=True):
            expected = rounded(matrix, method)
            # A float32 quotient may fall on the other side of a half, a step away: of a few at most.
            wrong = np.abs(other - expected) > 2e-6 * np.abs(matrix).max()
            assert wrong.mean() < 1e-3, name
    for name, W in values(built(family)).items():
        np.testing.assert_array_equal(W, before[name])


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("transformer", "int8"),
        ("transformer", "nf4"),
        ("mamba", "int4-g8"),
        ("jamba", "nf4"),
        ("rwkv", "int4"),
        ("xlstm", "float8"),
        *MORE.items(),
        *(
            pytest.param(family, method, marks=pytest.mark.slow)
            for family in configs.SMALL
            for method in (*ROUNDED, *MORE.values(), "int8@embedding+nf4", "q4_k_m", "int3-g16-asym-mse")
            if method != MORE[family]
        ),
    ],
)
def test_the_model_uses_the_weights_that_it_holds(family, method):
    """Its logits are those of a dense model with the same values, and not those of the original."""
    model = compress(built(family), parse(method))[-1].model
    found, expected, original = logits(model), logits(dense(model)), logits(built(family))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert np.abs(found - original).max() > 20 * np.abs(found - expected).max()


LEFT_OF_ALL = {"norm.scale": "no matrix", "mixer_norm.scale": "no matrix"}


LEFT = {
    "transformer": {"mixer.q_norm.scale": "no matrix"},
    "mamba": {
        "mixer.dt_proj.weight": "exponent of every decay",
        **dict.fromkeys(("mixer.A_log", "mixer.D", "mixer.conv_weight", "mixer.dt_bias"), "no matrix"),
    },
    "jamba": {"channel.router.weight": "chooses the experts", "mixer.dt_proj.weight": "decay"},
    "rwkv": {f"mixer.{name}.down.weight": "of low rank" for name in "wavg"} | {"mixer.w0": "no matrix"},
    "xlstm": {"mixer.i_gate.weight": "a gate is", "mixer.f_gate.weight": "a gate is", "mixer.f_bias": "no matrix"},
}


@pytest.mark.parametrize("family", configs.SMALL)
def test_every_parameter_is_changed_or_left_for_a_reason(family):
    names = {place.name for place in places(built(family))}
    for method in ("int8", "magnitude-2:4"):
        (step,) = compress(built(family), parse(method))
        assert set(step.changed) | step.left.keys() == names
        assert not set(step.changed) & step.left.keys()
        for ending, why in (LEFT_OF_ALL | LEFT[family]).items():
            assert any(name.endswith(ending) and why in said for name, said in step.left.items()), ending
        assert not [name for name in step.changed if "norm" in name or "router" in name or "bias" in name]
    head = "head.weight" if family == "xlstm" else "embedding.weight"
    assert "not pruned" in step.left[head]


def test_a_pattern_chooses():
    first, second = compress(built("transformer"), parse("int8@embedding+nf4"))
    assert first.changed == ("embedding.weight",)
    assert "is not for it" in first.left["periods.blocks.0.mixer.q.weight"]
    assert "embedding.weight" not in second.left
    held = {name: type(w.held).__name__ for name, w in named(second.model).items() if isinstance(w, Quantized)}
    assert held.pop("embedding.weight") == "Int8"
    assert set(held.values()) == {"NF4"}


def named(model: LanguageModel) -> dict:
    return {dotted(path): weight for path, weight in weights(model).items()}


def test_matrices_of_few_inputs_stay():
    """A scale would take as much room as their codes; blocks of a block-diagonal map are matrices by themselves."""
    pattern = tuple(BlockConfig(mixer=MLSTMBlockConfig(heads=2, projection=block)) for block in (4, 16))
    model = ModelConfig(width=32, layers=2, vocab_size=61, pattern=pattern)
    (step,) = compress(LanguageModel(model, nnx.Rngs(0)), parse("int4"))
    for name in "qkv":
        assert "of 4 inputs" in step.left[f"periods.blocks.0.mixer.{name}.weight"]
        assert f"periods.blocks.1.mixer.{name}.weight" in step.changed
    np.testing.assert_allclose(logits(step.model), logits(dense(step.model)), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("nf4+int8", "int8 changes nothing in this model: every matrix is quantized already"),
        ("int8+magnitude-50%", "prune before you quantize"),
        ("int8@mixer.z", "'mixer.z' is in no dense parameter's path; nearest: periods.blocks.*weight"),
        ("int8@router", "router.weight stays as it is \\(it chooses the experts\\)"),
        ("magnitude-2:4@embedding", "embedding.weight stays as it is \\(heads and tables"),
    ],
)
def test_a_rule_that_changes_nothing_is_an_error(method, error):
    with pytest.raises(UserError, match=error):
        abstract(config("jamba"), parse(method))


@pytest.mark.parametrize("family", configs.SMALL)
def test_bytes_and_the_abstract_model(family):
    """No dense copy is kept, and the names of the recipes alone give the shapes and types of what they make."""
    for method in ("int8", "magnitude-50%+nf4"):
        model = compress(built(family), parse(method))[-1].model
        shapes = jax.eval_shape(lambda method=method: nnx.state(abstract(config(family), parse(method))))
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(model))
        assert jax.tree.leaves(found) == jax.tree.leaves(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes))
        bits = 8 if "int8" in method else 4
        for name, weight in named(model).items():
            if isinstance(weight, Weight):
                *stack, K, N = weight.shape
                scales = N * (1 + -(-K // 64)) * 32 if name != "embedding.weight" else K * 64
                assert weight.nbytes * 8 <= np.prod(stack, dtype=int) * (bits * (K + 1) * (N + 1) + scales + 64), name
                assert weight.bits_per_weight == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) / np.prod(
                    weight.shape
                )


def test_a_decode_step_makes_no_dense_matrix(optimised):
    """Experts, tables and tied heads included: XLA's temporaries are smaller than the smallest of the dense ones."""
    width = 512
    jamba = dataclasses.replace(configs.experiment("jamba").model, width=width, vocab_size=8192)
    graphdef, params = nnx.split(abstract(jamba, parse("nf4")))

    def step(params, tokens, state):
        model = nnx.merge(graphdef, params)
        hidden, state = model(tokens, state)
        return model.logits(hidden), state

    state = jax.eval_shape(lambda: LanguageModel(jamba, nnx.Rngs(0)).initial_state(1, 16))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = jax.jit(step, donate_argnums=2).lower(params, token, state).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * width * 8192


def test_names():
    others = ("int4-g128", "magnitude-12.5%", "magnitude-1:16", "nf4@blocks.0", "int2", "int3-g32", "float8-tensor")
    for name in (*METHODS, *others, *KINDS, "gptq-int3-asym-mse", "int2-tensor-asym", "int8-mse", "budget-3@mixer"):
        (recipe,) = parse(name)
        assert str(recipe) == name
    chained = "magnitude-50%-global+int8@embedding+nf4"
    assert "+".join(map(str, parse(chained))) == chained
    for name, error in {
        "int5": "no method 'int5'; nearest: int",
        "int8+": "no method ''",
        "int4-g63": "int4-g63: a group is a multiple of 2; nearest: int4-g64",
        "int4-g0": "nearest: int4-g2",
        "int3-g60": "int3-g60: a group is a multiple of 8; nearest: int3-g64",
        "q5_k": "no method 'q5_k'; nearest: q4_k",
        "magnitude-4:4": "nearest: magnitude-3:4",
        "magnitude-0:2": "nearest: magnitude-1:2",
        "magnitude-100%": "more than 0 and less than 100 %",
        "int8@(": "not a regular expression",
    }.items():
        with pytest.raises(UserError, match=error):
            parse(name)


def batches():
    for key in jax.random.split(jax.random.key(3), 3):
        tokens = jax.random.randint(key, (2, 12), 0, 61)
        yield tokens, jnp.ones_like(tokens)


def hidden(model: LanguageModel) -> np.ndarray:
    return np.concatenate([np.ravel(model.forward(*given).hidden) for given in ((t, None, s) for t, s in batches())])


READING = [
    pytest.param(family, methods, marks=() if family == quick else pytest.mark.slow, id=f"{family}-{methods[0]}")
    for quick, methods in (
        ("jamba", ("gptq-int4", "int4")),
        ("xlstm", ("sparsegpt-2:4", "magnitude-2:4")),
        ("transformer", ("wanda-50%", "")),
    )
    for family in configs.SMALL
]
"""Of each method one family; slow tests have all."""


@pytest.mark.parametrize(("family", "methods"), READING)
def test_methods_that_read_text(family, methods):
    """They change what others of their kind change, and the model's answers to that text less."""
    better, plain = methods
    model = built(family)
    (step,) = compress(model, parse(better), lambda model, measure: measure(model, batches()))
    if plain:
        (other,) = compress(model, parse(plain))
        assert step.changed == other.changed
        answers = hidden(model)
        assert np.linalg.norm(hidden(step.model) - answers) < np.linalg.norm(hidden(other.model) - answers)
    else:
        moment = moments(model, batches())
        for place in places(model):
            if place.name in step.changed:
                w, found = np.asarray(place.value[...]), np.asarray(materialize(weights(step.model)[place.path]))
                norm = np.sqrt(np.diagonal(moment[place.path], axis1=-2, axis2=-1))[..., None]
                kept, score = found != 0, np.abs(w) * norm
                assert (kept.sum(-2) == w.shape[-2] - round(w.shape[-2] / 2)).all()
                np.testing.assert_array_equal(found[kept], w[kept])
                assert (np.where(kept, score, np.inf).min(-2) >= np.where(kept, 0, score).max(-2)).all()


@pytest.mark.parametrize("name", ["int4-g8", "int3-g16-asym"])
def test_without_text_gptq_is_rounding_to_nearest(name):
    ours, nearest = (values(compress(built("mamba"), parse(each))[-1].model) for each in (f"gptq-{name}", name))
    for name, w in ours.items():
        np.testing.assert_array_equal(w, nearest[name], err_msg=name)
