"""Structured pruning: what adds nothing is taken out and nothing else changes, in every kind of layer that has it."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from phyla.compression.calibrate import Moments
from phyla.compression.compress import abstract, compress
from phyla.compression.matrices import places
from phyla.compression.parts import DAMPING, importance, without
from phyla.compression.recipes import parse
from phyla.compression.units import UNITS, Cut, Piece, Units
from phyla.models import sizes
from phyla.models.config import BlockConfig, LayerConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6ChannelConfig, RWKV6Config
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.moe import MoEConfig
from phyla.models.registry import LAYERS

D, V = 16, 31


TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 0, V)


def model(
    *blocks: tuple[LayerConfig, LayerConfig | None], repeats: int = 2, prefix: tuple = (), **fields
) -> ModelConfig:
    pattern, prefix = (
        tuple(BlockConfig(mixer=mixer, channel=channel) for mixer, channel in each) for each in (blocks, prefix)
    )
    layers = len(prefix) + repeats * len(pattern)
    # An epsilon would be a larger part of a mean over fewer.
    given = {"norm": "layernorm", "norm_epsilon": 1e-12, "vocab_size": V} | fields
    return ModelConfig(width=D, layers=layers, pattern=pattern, prefix=prefix, **given)


RWKV7 = RWKV7Config(head_dim=4, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6)


MODELS = {
    "transformer": model(
        (AttentionConfig(heads=4, kv_heads=2, qk_norm=True, qkv_bias=True), GatedMLPConfig(expand=1.5, round_to=8)),
        (AttentionConfig(heads=4, kv_heads=1, window=3, out_bias=True), MLPConfig(bias=True)),
    ),
    "mamba": model(
        (MambaConfig(state=4, norms=True, bias=True), MoEConfig(experts=4, top_k=3, expand=1.0, shared=2)),
        (Mamba2Config(head_dim=4, state=6, groups=2), MoEConfig(experts=4, top_k=1, gated=False, expand=0.5)),
        (Mamba3Config(head_dim=4, state=6, groups=2), None),
    ),
    "rwkv": model(
        (RWKV7, RWKV7ChannelConfig()),
        (RWKV6Config(head_dim=4, mix_rank=3, decay_rank=4), RWKV6ChannelConfig()),
        (RWKV4Config(), RWKV4ChannelConfig()),
        prefix=((dataclasses.replace(RWKV7, value_residual=False), RWKV7ChannelConfig()),),
        embedding_norm=True,
        tie_embeddings=False,
    ),
    "xlstm": model(
        (MLSTMConfig(input_bias=4.0), GatedMLPConfig(expand=2.5)),
        (MLSTMBlockConfig(input_bias=4.0, bias=True, round_to=8), None),
        (SLSTMConfig(), None),
    ),
}


@functools.cache
def built(name: str) -> LanguageModel:
    """With random values wherever the initialisation has zeros."""
    made = LanguageModel(MODELS[name], nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(made)):
        variable[...] = np.asarray(variable[...]) + 0.1 * rng.standard_normal(variable.shape, np.float32)
    return made


@jax.jit
def logits(made: LanguageModel) -> jax.Array:
    return made.logits(made(TOKENS)[0])


def zero(part: np.ndarray, axis: int, units: list[int], total: int, begin: int = 0, each: int = 1) -> None:
    """The entries of the units, `each` of them, which begin at `begin` along the axis."""
    assert begin + total * each <= part.shape[axis]
    for unit in units:
        index = [slice(None)] * part.ndim
        index[axis] = slice(begin + unit * each, begin + (unit + 1) * each)
        part[tuple(index)] = 0


def attention_heads(p, config, gone):
    if config.kv_heads == 1:
        zero(p["o.weight"], 0, gone, 4, each=4)
    else:  # a key head with its two query heads
        zero(p["o.weight"], 0, gone, 2, each=8)


def mamba2_heads(p, config, gone):
    zero(p["in_proj.weight"], 1, gone, 8, begin=32, each=4)
    zero(p["conv_bias"], 0, gone, 8, each=4)


def mlstm_block_heads(p, config, gone):
    zero(p["down.weight"], 0, gone, 4, each=8)
    for gate, part in ((gate, part) for gate in "if" for part in range(3)):
        zero(p[f"{gate}_gate.weight"], 0, gone, 4, begin=32 * part, each=8)


def mamba_channels(p, config, gone):
    zero(p["out_proj.weight"], 0, gone, 32)
    zero(p["x_proj.weight"], 0, gone, 32)


def mamba_states(p, config, gone):
    for begin in (1, 5):
        zero(p["x_proj.weight"], 1, gone, 4, begin=begin)


def mamba2_states(p, config, gone):
    zero(p["in_proj.weight"], 1, gone, 12, begin=64)
    zero(p["conv_bias"], 0, gone, 12, begin=32)


def expert_neurons(p, config, gone):
    """Each expert its own."""
    hidden = p["down.weight"].shape[1]
    for expert in range(4):
        zero(p["down.weight"][expert], 0, [(unit + expert) % hidden for unit in gone], hidden)
    if config.shared:
        for shared in range(2):
            zero(p["shared.down.weight"], 0, gone, hidden, begin=hidden * shared)


def experts(p, config, gone):
    """Never used: the input is some 3 in every channel."""
    for unit in gone:
        p["up.weight"][unit] = 0
        p["router.weight"][:, unit] = -9


def rows(name, total, each):
    return lambda p, config, gone: zero(p[name], 0, gone, total, each=each)


SILENT = {
    "heads": {
        AttentionConfig: attention_heads,
        Mamba2Config: mamba2_heads,
        Mamba3Config: rows("out_proj.weight", 8, 4),
        MLSTMConfig: rows("out.weight", 4, 4),
        MLSTMBlockConfig: mlstm_block_heads,
        RWKV6Config: rows("output.weight", 4, 4),
        RWKV7Config: rows("output.weight", 4, 4),
    },
    "neurons": {
        GatedMLPConfig: lambda p, config, gone: zero(p["down.weight"], 0, gone, len(p["down.weight"])),
        MLPConfig: rows("down.weight", 64, 1),
        MoEConfig: expert_neurons,
        RWKV4ChannelConfig: rows("value.weight", 64, 1),
        RWKV6ChannelConfig: rows("value.weight", 56, 1),
        RWKV7ChannelConfig: rows("value.weight", 64, 1),
    },
    "experts": {MoEConfig: experts},
    "channels": {MambaConfig: mamba_channels, RWKV4Config: rows("output.weight", 16, 1)},
    "states": {MambaConfig: mamba_states, Mamba2Config: mamba2_states},
}
"""What makes units add nothing to anything: written by hand, from the equations."""


RUNS = {(kind, what): 1 for kind in LAYERS.values() for what in SILENT} | {
    (Mamba2Config, "heads"): 2,
    (Mamba3Config, "heads"): 2,
    (Mamba2Config, "states"): 2,
}
"""Runs of units of which as many go."""


def units_of(what: str, config: Any, made: ModelConfig) -> int:
    if what == "heads" and isinstance(config, AttentionConfig):
        return 4 if config.kv_heads == 1 else 2
    if what == "heads" and isinstance(config, Mamba2Config | Mamba3Config):
        return 8
    if what == "states":
        return 4 if isinstance(config, MambaConfig) else 12
    if what in ("heads", "experts"):
        return 4
    return config.hidden(made) if what == "neurons" else config.inner(made)


@functools.cache
def silenced(name: str, what: str) -> LanguageModel:
    """Half of the units of each layer add nothing; other ones in every layer, but where a value is shared."""
    made = nnx.clone(built(name))
    rng = np.random.default_rng(1)
    values = {place.name: np.array(place.value[...]) for place in places(made)}
    if what == "experts":
        for key in values:
            if key.endswith("channel_norm.bias"):
                values[key] += 3
    same = None
    for at, blocks in (("prefix", made.config.prefix), ("periods.blocks", made.config.pattern)):
        for i, block in enumerate(blocks):
            for part in ("mixer", "channel"):
                config, start = getattr(block, part), f"{at}.{i}.{part}."
                if type(config) not in SILENT[what]:
                    continue
                total, runs = units_of(what, config, made.config), RUNS[type(config), what]
                for layer in range(2) if at != "prefix" else [slice(None)]:
                    each = total // runs
                    gone = [run * each + n for run in range(runs) for n in rng.permutation(each)[: each // 2].tolist()]
                    if isinstance(config, RWKV7Config):
                        same = gone = same or gone
                    mine = {k.removeprefix(start): v[layer] for k, v in values.items() if k.startswith(start)}
                    SILENT[what][type(config)](mine, config, gone)
    for place in places(made):
        place.value[...] = values[place.name]
    return made


FITTING = [
    (name, what)
    for name, config in MODELS.items()
    for what in UNITS
    if any(type(layer) in SILENT[what] for block in config.blocks for layer in (block.mixer, block.channel))
]


@pytest.mark.parametrize(("name", "what"), FITTING)
def test_what_adds_nothing_is_taken_out(name, what):
    """The logits are the same, the model is an ordinary one of its configuration, and the shapes were foreseen."""
    made = silenced(name, what)
    (step,) = compress(made, parse(f"prune-{what}-50%"))
    before, after = logits(made), logits(step.model)
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
    foreseen = abstract(made.config, parse(f"prune-{what}-50%"))
    assert foreseen.config == step.model.config
    assert shapes(foreseen) == shapes(step.model) == shapes(sizes.abstract(step.model.config))
    if (name, what) in REMOVED:
        assert sizes.count(made.config) - sizes.count(step.model.config) == 2 * REMOVED[name, what]


def shapes(made: LanguageModel) -> dict:
    return {path: (leaf.shape, leaf.dtype, leaf.get_metadata()) for path, leaf in nnx.to_flat_state(nnx.state(made))}


MLSTM_HEADS = 2 * (2 * 2 * D + 3 * 4 * D + 2 * D + 2 + 4)


MLSTM_BLOCK_HEADS = 16 * (2 * (D + 1) + 4 + 1 + 3 * (4 + 1) + 2 + D) + 2 * (3 * 32 * 4 - 3 * 16 * 2 + 2)


REMOVED = {
    # One key head of two with two query heads, and their biases; two query heads of four.
    ("transformer", "heads"): (2 * 4 + 4 + 4) * (D + 1) + 2 * 4 * D + 2 * 4 * D * 2,
    ("transformer", "neurons"): 12 * D * 3 + 32 * (2 * D + 1),
    ("mamba", "channels"): 16 * (2 * (D + 1) + 4 + 1 + (1 + 8) + 1 + 1 + 4 + 1 + D),
    ("mamba", "states"): 2 * (2 * 32 + 32 + 2) + 6 * 2 * (D + 4 + 1),
    ("mamba", "heads"): 4 * (4 * (2 * D + 4 + 1 + 1 + D) + D + 3) + 4 * (4 * 3 * D + 3 * D + 2 * 6 + 2),
    ("mamba", "experts"): 2 * (D + 3 * D * 16) + 2 * (D + 2 * D * 8),
    ("mamba", "neurons"): 4 * 8 * 3 * D + 2 * 8 * 3 * D + 4 * 4 * 2 * D,
    ("rwkv", "channels"): 8 * (4 * D + 2),
    ("xlstm", "heads"): MLSTM_HEADS + MLSTM_BLOCK_HEADS,
    ("xlstm", "neurons"): 20 * 3 * D,
}
"""Parameters of one repeat that belong to half of its units, counted by hand."""


def text_of(made: LanguageModel):
    return lambda model, measure: measure(model, [(TOKENS, jnp.ones_like(TOKENS))])


HYBRID = model(
    (AttentionConfig(heads=2), GatedMLPConfig(expand=2.0)),
    (MambaConfig(state=4), None),
    (AttentionConfig(heads=4), MLPConfig()),
    repeats=1,
)


@functools.cache
def hybrid() -> LanguageModel:
    return LanguageModel(HYBRID, nnx.Rngs(0))


def test_what_is_left_decodes():
    """Token by token as at once, with states as small as the configuration says."""
    steps = compress(hybrid(), parse("prune-heads-50%+prune-channels-25%+prune-states-50%+prune-neurons-25%"))
    made = steps[-1].model
    state = made.initial_state(2, 9)
    attention, mamba, other = (each[0] for each in state.blocks)
    assert attention.k.shape == (1, 2, 1, 9, 8)
    assert other.k.shape == (1, 2, 2, 9, 4)
    assert mamba.scan.shape == (1, 2, 24, 2)
    assert mamba.conv.shape == (1, 2, 3, 24)
    assert [channel and channel.hidden(made.config) for channel in channels(made.config)] == [24, None, 48]
    step = jax.jit(lambda made, token, state: made(token, state))
    found = []
    for t in range(9):
        hidden, state = step(made, TOKENS[:, t : t + 1], state)
        found.append(made.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), logits(made), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.sets(st.integers(0, 6), min_size=4, max_size=4), st.integers(0, 99))
def test_rows_are_fitted_to_what_all_of_them_gave(chosen, seed):
    """Least squares in float64 on the vectors themselves, with a damped change; an input never seen keeps its row."""
    K, N, kept = 7, 3, sorted(chosen)
    rng = np.random.default_rng(seed)
    X, w = rng.standard_normal((20, K)), rng.standard_normal((K, N))
    X[:, K - 1] = 0
    H = X.T @ X
    gone = [k for k in range(K) if k not in kept]
    damping = np.where(np.diag(H)[kept] > 0, DAMPING * np.diag(H).mean(), 1)
    A = np.concatenate([X[:, kept], np.diag(np.sqrt(damping))])
    b = np.concatenate([X[:, gone] @ w[gone], np.zeros((len(kept), N))])
    expected = w[kept] + np.linalg.lstsq(A, b, rcond=None)[0]
    units = Units(count=K, cuts=(Cut("out.weight", -2, (1,)),))
    path = ("prefix", "out", "weight")
    values, moment = {path: jnp.float32(w)}, Moments({path: jnp.float32(H)})
    found = without(path[:1], units, jnp.array(kept), values, moment)[path]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_importance_on_a_text_is_what_a_unit_adds():
    rng = np.random.default_rng(0)
    X, w = rng.standard_normal((20, 12)), rng.standard_normal((12, 5))
    expected = [np.linalg.norm(X[:, 3 * i : 3 * i + 3] @ w[3 * i : 3 * i + 3]) for i in range(4)]
    out = Piece("out.weight", -2)
    units = Units(count=4, cuts=(Cut("out.weight", -2, (3,)),), judged=(out,))
    path = ("prefix", "out", "weight")
    found = importance(path[:1], units, {path: jnp.float32(w)}, Moments({path: jnp.float32(X.T @ X)}))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        each if each == ("transformer", "neurons") else pytest.param(*each, marks=pytest.mark.slow)
        for each in FITTING
        if each[1] != "experts"
    ],
)
def test_a_text_helps(name, what):
    """The answers to that text change less."""
    made = built(name)
    original, errors = np.asarray(logits(made)), []
    for method in ("", "-text"):
        (step,) = compress(made, parse(f"prune-{what}-50%{method}"), text_of(made))
        errors.append(np.linalg.norm(logits(step.model) - original))
    assert errors[1] < errors[0]


def test_experts_go_that_a_text_does_not_use():
    """However large their weights are."""
    config = model((AttentionConfig(heads=2), MoEConfig(experts=4, top_k=2, expand=1.0)))
    made = LanguageModel(config, nnx.Rngs(0))
    values = {place.name.removeprefix("periods.blocks.0."): place.value for place in places(made)}
    values["channel_norm.bias"][...] += 3
    for layer, gone in enumerate(([0, 2], [1, 2])):
        for unit in gone:
            router = values["channel.router.weight"]
            router[...] = router[...].at[layer, :, unit].set(-9)
            for name in ("up", "gate", "down"):
                weight = values[f"channel.{name}.weight"]
                weight[...] = weight[...].at[layer, unit].multiply(100)
    (text,) = compress(made, parse("prune-experts-50%-text"), text_of(made))
    (other,) = compress(made, parse("prune-experts-50%"))
    before = logits(made)
    np.testing.assert_allclose(logits(text.model), before, atol=2e-5 * np.abs(before).max())
    assert np.abs(logits(other.model) - before).max() > 0.1


def test_a_number_instead_of_a_share():
    config = abstract(HYBRID, parse("prune-heads-1+prune-channels-8@blocks.1+prune-neurons-5@blocks.0")).config
    first, second, third = (block.mixer for block in config.pattern)
    assert (first, third) == (AttentionConfig(heads=1, head_dim=8), AttentionConfig(heads=3, head_dim=4))
    assert isinstance(second, MambaConfig)
    assert second.inner(config) == 24
    assert [channel and channel.hidden(config) for channel in channels(config)] == [27, None, 64]


def channels(config: ModelConfig) -> list[Any]:
    return [block.channel for block in config.pattern]


@given(st.integers(1, 5000), st.integers(1, 20000))
def test_ratios_give_the_width_again(width, hidden):
    config = ModelConfig(width=width, layers=1, pattern=(BlockConfig(mixer=AttentionConfig()),))
    assert GatedMLPConfig(expand=hidden / width).hidden(config) == hidden


def test_every_kind_of_layer_is_known():
    """A new one that has heads or a hidden layer should say so in the table."""
    assert {kind for kinds in UNITS.values() for kind in kinds} == set(LAYERS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "recipe", "ratio"),
    [
        ((AttentionConfig(heads=8), GatedMLPConfig()), "prune-heads-50%+prune-neurons-50%", 1.4),
        ((MambaConfig(), None), "prune-channels-50%", 1.4),
        ((RWKV7Config(), RWKV7ChannelConfig()), "prune-heads-50%+prune-neurons-50%", 1.2),
        ((MLSTMConfig(), GatedMLPConfig()), "prune-heads-50%+prune-neurons-50%", 1.2),
        ((AttentionConfig(heads=8), GatedMLPConfig()), "prune-layers-50%", 1.4),
    ],
)
def test_it_is_faster(optimised, block, recipe, ratio):
    """Reading a text and writing one, at a width of 512: against the model before, in turns, the best time of each."""
    mixer = dataclasses.replace(block[0], value_residual=False) if isinstance(block[0], RWKV7Config) else block[0]
    pattern = (BlockConfig(mixer=mixer, channel=block[1]),)
    made = LanguageModel(ModelConfig(width=512, layers=4, vocab_size=256, pattern=pattern), nnx.Rngs(0))
    models = [made, compress(made, parse(recipe))[-1].model]
    tokens = jax.random.randint(jax.random.key(0), (4, 128), 0, 256)

    @jax.jit
    def read(made, tokens):
        return made(tokens, made.initial_state(len(tokens), 256))

    @jax.jit
    def write(made, tokens, state):
        def one(carry, _):
            hidden, state = made(*carry)
            return (jnp.argmax(made.logits(hidden), axis=-1), state), None

        return jax.lax.scan(one, (tokens, state), length=32)[0][0]

    states = [read(made, tokens)[1] for made in models]
    phases = (lambda i: read(models[i], tokens), lambda i: write(models[i], tokens[:, :1], states[i]))
    for phase in phases:
        seconds = [[], []]
        for turn in range(16):
            begin = time.perf_counter()
            jax.block_until_ready(phase(turn % 2))
            seconds[turn % 2].append(time.perf_counter() - begin)
        before, after = map(min, seconds)
        print(f"{recipe}: {before / after:.2f} times as fast")
        assert before / after > ratio


ALIBI = model((AttentionConfig(positions="alibi"), MLPConfig()))


XLSTM = MODELS["xlstm"]


@pytest.mark.parametrize(
    ("config", "method", "error"),
    [
        (
            ALIBI,
            "prune-heads-50%",
            "ALiBi's slopes are by the number of the head; what fits: prune-neurons-50%, ",
        ),
        (
            model((SLSTMConfig(), None)),
            "prune-heads-50%",
            "part of the residual stream; what fits: prune-layers-50%",
        ),
        (model((Mamba3Config(head_dim=8, state=6), None)), "prune-states-1", "its states turn in pairs"),
        (XLSTM, "prune-experts-50%", "it has no experts; what fits: prune-heads-50%, prune-neurons-50%, prune-layers"),
        (XLSTM, "prune-heads-4", "4 of 4 heads cannot go; nearest: prune-heads-3; what fits"),
        (XLSTM, "prune-heads-5%", "5% of 4 heads cannot go; nearest: prune-heads-1"),
        (MODELS["mamba"], "prune-heads-3", "3 of 8 heads, alike in 2 groups, cannot go; nearest: prune-heads-2"),
        (MODELS["transformer"], "prune-layers-1", "1 of 2 repeats of 2 blocks cannot go; nearest: prune-layers-2"),
        (
            model((MambaConfig(), None), repeats=1),
            "prune-layers-50%",
            "one block that is not in the prefix has to",
        ),
        (HYBRID, "tie-layers-2", "does not divide the pattern's 1 repeats .* it has nothing to share"),
        (ALIBI, "tie-layers-3", "tie-layers-3 does not divide the pattern's 2 repeats .* nearest: tie-layers-2"),
        (ALIBI, "int8+prune-neurons-50%", "prune-neurons-50% takes parts of arrays, and .* put it before what made"),
        (ALIBI, "int8@embedding+tie-layers-2", "and embedding.weight is none any more"),
        (ALIBI, "prune-neurons-50%@blocks.1", "'blocks.1' is in no path of a layer with neurons"),
        (MODELS["rwkv"], "prune-heads-50%@prefix", "blocks that share a value lose the same heads; nearest: prune-h"),
    ],
)
def test_refused(config, method, error):
    """One line that says what fits."""
    with pytest.raises(UserError, match=error) as found:
        abstract(config, parse(method))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("prune-heads-100%", "more than 0 and less than 100 % can go; nearest: prune-heads-50%"),
        ("prune-heads-2.5", "a whole number goes, or a share in %; nearest: prune-heads-2"),
        ("prune-head-25%", "no method 'prune-head-25%'; nearest: prune-heads-25%"),
        ("prune-layers-2@blocks.1", "is for whole blocks; nearest: prune-layers-2"),
        ("tie-layers-1", "at least 2 become one; nearest: tie-layers-2"),
    ],
)
def test_wrong_names(method, error):
    with pytest.raises(UserError, match=error):
        parse(method)
