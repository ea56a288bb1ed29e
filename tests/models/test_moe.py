"""Mixture of experts against float64, one token at a time; loads and losses; weight objects; sharding."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from phyla.models import sizes
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.errors import UserError
from phyla.models.language_model import LanguageModel
from phyla.models.layers import ExpertLinear
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.moe import MoEConfig, auxiliary_losses
from phyla.models.weights import Weight, fan_in, materialize

D = 6


def model_of(config: MoEConfig, **fields) -> ModelConfig:
    block = BlockConfig(mixer=AttentionConfig(heads=3), channel=config)
    return ModelConfig(**{"width": D, "layers": 2, "vocab_size": 11, "pattern": (block,)} | fields)


def layer_of(config: Any, width: int = D) -> Any:
    """With a router that has an opinion."""
    layer: Any = config.build(model_of(config, width=width), nnx.Rngs(0), 0)
    layer.router.weight[...] = jax.random.normal(jax.random.key(1), layer.router.weight.shape)
    return layer


def weights_of(layer: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(nnx.state(layer))}


def silu(x):
    return x / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def mlp(config, w, x, prefix, expert=...):
    """An expert, or the shared ones."""
    activation = {"silu": silu, "relu": relu}[config.activation]
    up = x @ w[f"{prefix}up.weight"][expert]
    hidden = activation(x @ w[f"{prefix}gate.weight"][expert]) * up if config.gated else activation(up)
    return hidden @ w[f"{prefix}down.weight"][expert]


def expected(config, w, x, real=None):
    """y and the routing, in float64."""
    y, E = np.zeros_like(x), config.experts
    load, probability, z, tokens = np.zeros(E), np.zeros(E), 0.0, 0
    for where in np.ndindex(x.shape[:2]):
        logits = x[where] @ w["router.weight"]
        if config.shared:
            y[where] += mlp(config, w, x[where], "shared.")
        if real is not None and not real[where]:
            continue
        best = np.argsort(-logits)[: config.top_k]
        every = np.exp(logits) / np.exp(logits).sum()
        chosen = every[best] / every[best].sum() if config.weights == "softmax_of_chosen" else every[best]
        for expert, weight in zip(best, chosen, strict=True):
            y[where] += weight * mlp(config, w, x[where], "", expert)
            load[expert] += 1
        probability += every
        z += np.log(np.exp(logits).sum()) ** 2
        tokens += 1
    return y, (load, probability, z, tokens)


CONFIGS = {
    "chosen": MoEConfig(experts=4, top_k=2, expand=1.5),
    "all": MoEConfig(experts=5, top_k=3, expand=0.7, weights="softmax_of_all"),
    "shared": MoEConfig(experts=3, top_k=1, weights="softmax_of_all", shared=2, activation="relu"),
    "not gated": MoEConfig(experts=4, top_k=2, gated=False, activation="relu", shared=1),
    "one": MoEConfig(experts=1, top_k=1),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> MoEConfig:
    return CONFIGS[request.param]


# Few tokens multiply gathered matrices, many are sorted by expert; 150 also need more than one tile.
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 7), (1, 150)])
def test_output_and_routing(config, shape):
    layer = layer_of(config)
    x = np.random.default_rng(0).standard_normal((*shape, D)).astype(np.float32)
    y, state, routing = jax.jit(lambda x: layer(x))(x)
    expected_y, expected_routing = expected(config, weights_of(layer), x.astype(np.float64))
    assert state is None
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    for a, b in zip(routing, expected_routing, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2), (2, 7)])
def test_padding_counts_nowhere(config, shape):
    layer = layer_of(config)
    x = np.random.default_rng(0).standard_normal((*shape, D)).astype(np.float32)
    segment_ids = np.arange(math.prod(shape)).reshape(shape) % 3  # 0 is padding
    y, _, routing = layer(jnp.asarray(x), None, jnp.asarray(segment_ids))
    expected_y, expected_routing = expected(config, weights_of(layer), x.astype(np.float64), segment_ids != 0)
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    for a, b in zip(routing, expected_routing, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
def test_gradients(config, shape):
    """By central differences in float64 of the reference; the choice of experts is constant."""
    layer = layer_of(config)
    graphdef, params = nnx.split(layer)
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((*shape, D)).astype(np.float32) for _ in range(2))

    def loss(params, x):
        y, _, routing = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * g) + jnp.sum(jnp.sin(routing.probability)) + routing.z

    dw, dx = jax.jit(jax.grad(loss, (0, 1)))(params, x)

    def exact(w, x):
        y, (_, probability, z, _) = expected(config, w, x)
        return np.sum(y * g) + np.sum(np.sin(probability)) + z

    w, x64 = weights_of(layer), x.astype(np.float64)

    def along(name, direction, step=1e-6):
        sides = []
        for sign in (1, -1):
            moved = {k: v + sign * step * direction if k == name else v for k, v in w.items()}
            sides.append(exact(moved, x64 + (sign * step * direction if name == "x" else 0)))
        return (sides[0] - sides[1]) / (2 * step)

    found = {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(dw)} | {"x": np.asarray(dx)}
    for name, gradient in found.items():
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            size = np.linalg.norm(gradient) * np.linalg.norm(direction)
            np.testing.assert_allclose(np.sum(gradient * direction), along(name, direction), atol=1e-4 * size + 1e-5)


def test_the_router_works_in_float32():
    """Two experts whose logits bfloat16 cannot tell apart."""
    layer = layer_of(MoEConfig(experts=2, top_k=1, weights="softmax_of_all"))
    layer.router.weight[...] = jnp.asarray([[1.0, 1.001]] + [[0.0, 0.0]] * (D - 1))
    x = jnp.zeros((1, 20, D), "bfloat16").at[..., 0].set(1.0)
    y, _, routing = layer(x)
    assert y.dtype == "bfloat16"
    assert routing.load.tolist() == [0, 20]
    assert routing.probability.dtype == jnp.float32
    np.testing.assert_allclose(routing.probability[1] / 20, 1 / (1 + math.exp(-0.001)), rtol=1e-6)


def test_no_token_is_dropped_when_all_choose_the_same_expert():
    config = MoEConfig(experts=8, top_k=1)
    layer = layer_of(config)
    layer.router.weight[...] = jnp.zeros((D, 8)).at[:, 3].set(1.0)
    x = np.abs(np.random.default_rng(0).standard_normal((2, 200, D))).astype(np.float32)
    y, _, routing = layer(jnp.asarray(x))
    assert routing.load.tolist() == [0, 0, 0, 400, 0, 0, 0, 0]
    np.testing.assert_allclose(y, expected(config, weights_of(layer), x.astype(np.float64))[0], atol=1e-5)


class Halves(Weight):
    """A matrix as twice its half."""

    def __init__(self, dense: jax.Array):
        self.half = nnx.Param(dense / 2)

    def matmul(self, x: jax.Array) -> jax.Array:
        return 2 * (x @ self.half[...].astype(x.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.half.shape

    def materialize(self) -> jax.Array:
        return 2 * self.half[...]


def test_experts_may_be_weight_objects():
    """In a scanned model, for sorted and for gathered tokens; and they train."""
    model = LanguageModel(model_of(MoEConfig(experts=4)), nnx.Rngs(0))
    tokens = jnp.arange(10).reshape(2, 5)
    run = jax.jit(lambda model, tokens: model(tokens)[0])
    before = run(model, tokens), run(model, tokens[:1, :1])
    swapped = 0
    for _, module in nnx.iter_modules(model.periods):
        if isinstance(module, ExpertLinear):
            module.weight = jax.vmap(jax.vmap(Halves))(materialize(module.weight))
            swapped += 1
    assert swapped == 3
    jax.tree.map(np.testing.assert_array_equal, (run(model, tokens), run(model, tokens[:1, :1])), before)
    graphdef, params = nnx.split(model)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(tokens)[0])))(params)
    halves = [g for path, g in nnx.to_flat_state(gradient) if path[-1] == "half"]
    assert len(halves) == 3
    assert all(jnp.abs(g[...]).max() > 0 for g in halves)


def test_every_expert_is_drawn_for_itself():
    linear = ExpertLinear(3, (400, 50), ("embed", "mlp"), nnx.Rngs(0), init=fan_in(0.5))
    weight = np.asarray(materialize(linear.weight))
    np.testing.assert_allclose(weight.std(axis=(1, 2)), 0.5 / 20, rtol=0.02)
    assert abs(np.corrcoef(weight.reshape(3, -1))[0, 1]) < 0.05


def test_auxiliary_losses_by_hand():
    """A prefix and a pattern whose mixtures differ, over two documents and padding."""
    first = MoEConfig(experts=5, top_k=1, weights="softmax_of_all", balance_loss=0.3, z_loss=0.0)
    other = MoEConfig(experts=3, top_k=2, balance_loss=0.1, z_loss=0.7)
    prefix = (BlockConfig(mixer=AttentionConfig(heads=3), channel=first),)
    config = model_of(other, layers=3, prefix=prefix)
    model = LanguageModel(config, nnx.Rngs(0))
    tokens = jnp.arange(18).reshape(2, 9) % 11
    segment_ids = jnp.asarray([[1] * 4 + [2] * 5, [0] * 3 + [1] * 4 + [0] * 2])
    routing = model.forward(tokens, segment_ids=segment_ids).routing
    total, metrics = auxiliary_losses(config, routing)
    assert [sums.load.shape for sums in routing] == [(1, 5), (2, 3)]
    balances, zs, shares, sum_ = [], [], [], 0.0
    for mixture, sums in ((first, routing[0]), (other, routing[1])):
        for load, probability, z, count in zip(*(np.asarray(leaf, np.float64) for leaf in sums), strict=True):
            assert count == 13
            assert load.sum() == 13 * mixture.top_k
            np.testing.assert_allclose(probability.sum(), 13, rtol=1e-6)
            share = load / load.sum()
            balances.append(mixture.experts * np.sum(share * probability / 13))
            zs.append(z / 13)
            shares += share.tolist()
            sum_ += mixture.balance_loss * balances[-1] + mixture.z_loss * zs[-1]
    np.testing.assert_allclose(total, sum_, rtol=1e-6)
    np.testing.assert_allclose(metrics["balance_loss"], np.mean(balances), rtol=1e-6)
    np.testing.assert_allclose(metrics["z_loss"], np.mean(zs), rtol=1e-6)
    np.testing.assert_allclose(metrics["busiest_expert"], max(shares), rtol=1e-6)
    np.testing.assert_allclose(metrics["idlest_expert"], min(shares), atol=1e-6)


def test_the_balance_loss_is_one_when_balanced_and_E_when_collapsed():
    config = model_of(MoEConfig(experts=4, top_k=1, weights="softmax_of_all"), layers=1)
    layer = layer_of(config.pattern[0].channel)
    x = jnp.tile(jnp.eye(4, D), (1, 3, 1))

    def balance(router):
        layer.router.weight[...] = router
        routing = jax.tree.map(lambda leaf: leaf[None], layer(x)[2])
        return auxiliary_losses(config, (routing,))[1]["balance_loss"]

    np.testing.assert_allclose(balance(50 * jnp.eye(D, 4)), 1, rtol=1e-6)
    np.testing.assert_allclose(balance(jnp.zeros((D, 4)).at[:, 2].set(50)), 4, rtol=1e-6)


def test_no_real_token_is_no_nan():
    config = model_of(MoEConfig())
    model = LanguageModel(config, nnx.Rngs(0))
    output = model.forward(jnp.zeros((1, 3), jnp.int32), segment_ids=jnp.zeros((1, 3), jnp.int32))
    total, metrics = auxiliary_losses(config, output.routing)
    assert jnp.isfinite(output.hidden).all()
    assert total == 0
    assert all(jnp.isfinite(value) for value in metrics.values())


def test_only_chosen_experts_count_as_operations():
    V, d, T = 50, 16, 64
    mixer = AttentionConfig(heads=4, head_dim=8)
    pattern = (BlockConfig(mixer=mixer, channel=MoEConfig(experts=8, top_k=2, expand=2.0, shared=1)),)
    config = ModelConfig(width=d, layers=3, vocab_size=V, pattern=pattern)
    expert = 3 * d * 2 * d
    dense = V * d + 3 * (4 * d * 32 + d * 8)
    assert sizes.count(config) == dense + 3 * (8 + 1) * expert + 3 * 2 * d + d
    matrices = dense + 3 * (2 + 1) * expert
    assert sizes.flops_per_token(config, T) == 2 * matrices + 3 * mixer.flops_per_token(config, T)


@pytest.mark.parametrize("mesh_shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)])
@pytest.mark.slow
def test_devices_share_the_work_and_the_answer_is_the_same(mesh_shape):
    """With the mesh as the context each device sorts its own tokens: no array has the whole batch's."""
    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    layer = layer_of(MoEConfig(experts=4, expand=2.0), width=8)
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(2), (4, 40, 8))

    def loss(params, x):
        y, _, routing = nnx.merge(graphdef, params)(x)
        return jnp.sum(jnp.sin(y)) + routing.z, (y, routing)

    def place(variable):
        names = {"embed": "fsdp", "mlp": "tensor"}
        spec = P(*(names.get(axis) for axis in variable.get_metadata()["axes"]))
        return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), variable)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = jax.jit(run)(params, x)
    placed = jax.tree.map(place, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    rows = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(placed, rows).compile()
    found = compiled(placed, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, expected)
    assigned = 4 * 40 * 2  # of tokens to experts, over the whole batch
    whole_batch = f"f32[{assigned},8]" in (compiled.as_text() or "")
    assert whole_batch == (mesh_shape[:2] == (1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, r"moe\.experts must be at least 1, not 0"),
        ({"top_k": 9}, r"moe\.top_k must be at least 1 and at most moe\.experts 8, not 9; nearest: 8"),
        ({"top_k": 0}, r"moe\.top_k must be .* nearest: 1"),
        ({"expand": 0.01}, r"moe\.expand must give at least one hidden channel, not 0.01"),
        ({"shared": -1}, r"moe\.shared must be at least 0, not -1"),
        ({"balance_loss": float("nan")}, r"moe\.balance_loss must be at least 0, not nan"),
    ],
)
def test_impossible_values_name_the_field(change, message):
    config = dataclasses.replace(MoEConfig(), **change)
    with pytest.raises(UserError, match=message):
        config.build(model_of(config), nnx.Rngs(0), 0)
