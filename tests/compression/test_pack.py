"""N:M packed matrices: what they hold, that they restore every bit, and what is made of their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla import configs
from phyla.compression.compress import abstract, compress
from phyla.compression.recipes import parse
from phyla.models.errors import UserError
from phyla.models.packed import Packed, pack_groups
from phyla.models.quantized import Quantized
from tests.compression.test_compress import built, config, dense, logits, named, values


def n_of_m(K: int, N: int, keep: int, group: int) -> np.ndarray:
    """Of random places, in some groups fewer."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((K, N)).astype(np.float32)
    for k in range(0, K, group):
        for n in range(N):
            gone = rng.permutation(group)[keep - (n % 3 == 0) :]
            w[k + gone[k + gone < K], n] = 0
    return w


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 2), (3, 7)])
def test_every_bit_is_restored(keep, group):
    """By blocks of outputs and a rest; the last group is shorter; products and both gradients against float64."""
    K, N = 45, 300
    w = n_of_m(K, N, keep, group)
    kept, places = pack_groups(jnp.asarray(w), keep, group)
    assert kept.shape == (N, -(-K // group) * keep)
    held = Packed(nnx.Param(kept), places, ("in", "out"), K, keep, group)
    np.testing.assert_array_equal(held.materialize(), w)
    assert held.shape == w.shape
    assert held.nbytes == kept.size * 4 + places.size
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((2, 3, K)), rng.standard_normal((2, 3, N))

    @jax.jit
    def both(x, kept, g):
        def call(x, kept):
            return Packed(nnx.Param(kept), places, ("in", "out"), K, keep, group).matmul(x)

        y, back = jax.vjp(call, x, kept)
        return y, *back(g)

    y, dx, d_kept = both(jnp.asarray(x, jnp.float32), kept, jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(y, x @ w, atol=2e-5)
    np.testing.assert_allclose(dx, g @ w.T, atol=1e-4)
    whole = Packed(nnx.Param(d_kept), places, ("in", "out"), K, keep, group).materialize()
    expected = np.einsum("btk,btn->kn", x, g)
    np.testing.assert_allclose(np.asarray(whole)[w != 0], expected[w != 0], atol=1e-4)


FAMILIES = [f if f == "jamba" else pytest.param(f, marks=pytest.mark.slow) for f in configs.SMALL]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Packed, then rounded: half the matrix and 2 bits for each of its values, exactly the model that was pruned."""
    pruned, packed, rounded = compress(built(family), parse("magnitude-2:4+pack-2:4+int8"))
    before, after = values(pruned.model), values(packed.model)
    for name, weight in named(packed.model).items():
        np.testing.assert_array_equal(after[name], before[name])
        if name in packed.changed:
            assert isinstance(weight, Packed)
            K, _ = weight.shape[-2:]
            if K % 16 == 0:
                assert weight.bits_per_weight == 17
                # Scales of the outputs; values and places.
                assert named(rounded.model)[name].bits_per_weight == pytest.approx(5 + 32 / K)
    exact, found = values(compress(pruned.model, parse("int8"))[-1].model), values(rounded.model)
    for name, weight in named(rounded.model).items():
        if name in packed.changed:
            assert isinstance(weight.values, Quantized)
        np.testing.assert_array_equal(found[name], exact[name])
    said = logits(rounded.model)
    np.testing.assert_allclose(said, logits(dense(rounded.model)), atol=2e-4 * np.abs(said).max())
    chain = parse("magnitude-2:4+pack-2:4+int8")
    shapes = jax.eval_shape(lambda: abstract(config(family), chain))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(shapes)) == jax.tree.map(jnp.shape, jax.tree.leaves(rounded.model))


def test_only_what_has_the_zeros_is_packed():
    """And the run is recorded by its name; no text tells of packed values."""
    _, step = compress(built("transformer"), parse("magnitude-2:4@mlp|channel+pack-2:4"))
    assert step.changed
    assert all("channel" in name for name in step.changed)
    (rule,) = step.rules
    assert str(rule).startswith("pack-2:4@^(periods")
    again = compress(built("transformer"), parse(f"magnitude-2:4@channel+{rule}"))[-1]
    assert again.changed == step.changed
    (gptq,) = compress(step.model, parse("gptq-int4"))
    assert "no text tells" in gptq.left[f"{step.changed[0]}.values"]


def test_refusals():
    with pytest.raises(UserError, match=r"weight has up to 4 of 4 that are not zero; nearest: magnitude-2:4\+pack-2:4"):
        compress(built("transformer"), parse("pack-2:4"))
    for chain, error in {
        "pack-4:4": "nearest: pack-3:4",
        "pack-15:16": "inputs: 15 of 16 and 4 bits for each are not less",
        "pack-2:4+pack-2:4": "packed already",
        "pack-2:4@embedding": "hence not packed",
    }.items():
        with pytest.raises(UserError, match=error):
            abstract(config("transformer"), parse(chain))


def test_a_decode_step_makes_no_dense_copy(optimised):
    K, N = 1024, 2048

    def step(x, kept, places):
        return Packed(nnx.Param(kept), places, ("in", "out"), K, 2, 4).matmul(x)

    shapes = (1, K), (N, K // 2), (K // 8, N)
    given = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.uint8), strict=True)]
    memory = jax.jit(step).lower(*given).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * K * N / 2
