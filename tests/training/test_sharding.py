"""Parallelism: eight devices compute what one does; what does not fit is refused."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from phyla.models.errors import UserError
from phyla.training import sharding
from phyla.training.config import MeshConfig


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_eight_devices_equal_one(experiment, setup, batch, data, fsdp, tensor):
    step, state, _, _ = setup(experiment)
    expected, metrics = step(state, batch)
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), 8)
    layout = sharding.shardings(state, mesh)
    spread = jax.device_put(state, layout)
    shards = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(spread.params)}
    assert (True in shards) == (fsdp * tensor > 1)
    whole = NamedSharding(mesh, PartitionSpec())
    rows = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
    assert rows["tokens"].sharding.shard_shape((8, 9)) == (8 // (data * fsdp), 9)
    found, found_metrics = jax.jit(step, out_shardings=(layout, whole))(spread, rows)
    np.testing.assert_allclose(found_metrics.loss, metrics.loss, rtol=1e-5)
    np.testing.assert_allclose(found_metrics.gradient_norm, metrics.gradient_norm, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), expected.params, found.params)


def test_moments_are_divided_like_their_parameters(experiment, setup):
    _, state, _, _ = setup(experiment)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 8)
    layout = sharding.shardings(state, mesh)
    nodes = jax.tree.leaves(layout.optimizer, is_leaf=lambda node: isinstance(node, nnx.State))
    moments = [node for node in nodes if isinstance(node, nnx.State) and node]
    assert len(moments) == 2
    for moment in moments:
        jax.tree.map(lambda a, b: None if a == b else pytest.fail(f"{a} {b}"), layout.params, moment)


def test_an_axis_that_does_not_divide_is_replicated_and_counted(experiment, setup):
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=8), 8)
    assert sharding.spec((16, 24), ("embed", "mlp"), mesh) == PartitionSpec("fsdp", "tensor")
    assert sharding.spec((16, 20), ("embed", "mlp"), mesh) == PartitionSpec("fsdp", None)
    _, state, _, _ = setup(experiment)
    assert sharding.replicated_dimensions(state.params, mesh) == 1  # the embedding: 31 tokens


def test_two_axes_on_one_mesh_axis_are_an_error():
    mesh = sharding.make_mesh(MeshConfig(), 8)
    with pytest.raises(ValueError, match="same mesh axis"):
        sharding.spec((8, 8), ("mlp", "heads"), mesh)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (MeshConfig(data=16), 16, "16 devices, but there are 8; nearest: mesh.data 8"),
        (MeshConfig(fsdp=3, tensor=4), 12, "12 devices, but there are 8"),
        (MeshConfig(), 12, "does not divide a microbatch of 12 sequences; nearest: mesh.data 6"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, rows, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(config, rows)


def test_every_logical_axis_of_every_layer_is_divided_or_known_to_be_whole(experiment, setup):
    _, state, _, _ = setup(experiment)
    variables = jax.tree.leaves(state.params, is_leaf=lambda n: isinstance(n, nnx.Variable))
    axes = set(itertools.chain.from_iterable(v.get_metadata()["axes"] for v in variables))
    assert axes <= set(sharding.RULES) | {"layers", "norm", "conv", "state", "head_dim", "positions"}


def test_a_mesh_takes_the_devices_it_is_given():
    mesh = sharding.make_mesh(MeshConfig(data=-1, tensor=2), 8)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dataclasses.asdict(MeshConfig()) == {"data": -1, "fsdp": 1, "tensor": 1}
