"""sLSTM: what is particular to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.dispatch import Unfit
from phyla.kernels.segments import starts
from phyla.kernels.slstm import slstm, tpu_blocks
from phyla.kernels.slstm.tpu import slstm_tpu
from phyla.kernels.slstm.xla import CHUNK, log_sigmoid
from phyla.training import targets
from tests.kernels.chip import temporaries
from tests.kernels.ops.slstm import H, P, draw, draw_state

IMPLEMENTATIONS = ["reference", "xla"]
WITH_KERNEL = [*IMPLEMENTATIONS, "tpu"]


def call(gates, R, bias, state=None, **options):
    i, f, z, o = gates
    return slstm(i, f, z, o, R, bias, initial_state=state, **options)


def arguments(B, T, seed=0):
    rng = np.random.default_rng(seed)
    drawn = {name: jnp.asarray(value, jnp.float32) for name, value in draw(rng, B, T, False).items()}
    state = tuple(jnp.asarray(part, jnp.float32) for part in draw_state(rng, B))
    return tuple(drawn[name] for name in "ifzo"), drawn["R"], drawn["bias"], state


def test_log_sigmoid_is_exact_where_little_is_forgotten():
    """log(1 + e) would round e to multiples of 1e-7 of 1, at each of thousands of tokens."""
    x = np.linspace(-30, 30, 6001, dtype=np.float32)
    np.testing.assert_allclose(log_sigmoid(x), -np.logaddexp(0, -x.astype(np.float64)), rtol=4e-7)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("extreme", [1e3, 3e38])
def test_finite_at_the_edges_of_the_range(implementation, extreme):
    """Gates of either sign, beyond what any exp can hold; |h| <= 1 whatever they are."""
    B, T = 2, 2 * CHUNK + 3
    gates, R, bias, state = arguments(B, T)
    gates = tuple(jnp.sign(gate) * extreme for gate in gates)
    for initial in (None, state):
        outputs, vjp = jax.vjp(lambda *a: call(*a, implementation=implementation), gates, R, bias, initial)
        h, (_, n, _, _) = outputs
        assert np.abs(h).max() <= 1
        assert n.min() >= 1
        for leaf in jax.tree.leaves((outputs, vjp(jax.tree.map(jnp.ones_like, outputs)))):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_empty_state_is_not_a_memory_of_size_one(implementation):
    """At the first token h is σ(o) tanh(z), whatever the gates i and f: there is nothing to forget, or to weigh."""
    gates, R, bias, _ = arguments(2, 1)
    i, f, z, o = gates
    for shift in (0.0, -20.0, 20.0):
        zeros = (jnp.zeros((2, H, P)),) * 4
        h, (_, n, _, m) = call((i + shift, f - shift, z, o), R, bias, zeros, implementation=implementation)
        np.testing.assert_allclose(h, jax.nn.sigmoid(o + bias[3]) * jnp.tanh(z + bias[2]), rtol=1e-6)
        np.testing.assert_allclose(n, 1)
        np.testing.assert_allclose(m, (i + shift + bias[0])[:, 0], rtol=1e-6)


def test_states_in_other_units_are_the_same_state():
    """(c, n, m) and (c e^-u, n e^-u, m + u) say the same; the gradients know that too."""
    gates, R, bias, (c, n, h, m) = arguments(2, 5)
    u = 0.7

    def loss(state):
        return jnp.sum(jnp.sin(call(gates, R, bias, state)[0]))

    value, (dc, dn, _, dm) = jax.value_and_grad(loss)((c, n, h, m))
    np.testing.assert_allclose(loss((c * np.exp(-u), n * np.exp(-u), h, m + u)), value, rtol=1e-6)
    np.testing.assert_allclose(dm, dc * c + dn * n, rtol=1e-4, atol=1e-6)
    assert np.abs(dm).max() > 1e-3


@pytest.mark.parametrize("implementation", WITH_KERNEL)
def test_the_recurrence_starts_afresh_too(implementation):
    """A large R makes a leak of h from one document into the next loud."""
    gates, R, bias, _ = arguments(1, 9)
    segment_ids = jnp.asarray([[0] * 5 + [1] * 4])
    packed = call(gates, 30 * R, bias, segment_ids=segment_ids, implementation=implementation)[0]
    alone = call(tuple(gate[:, 5:] for gate in gates), 30 * R, bias, implementation=implementation)[0]
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-6)


def test_second_derivative_through_padding():
    """The last chunk is padded; its gates are infinite, and must not turn into NaN."""
    gates, R, bias, state = arguments(1, CHUNK + 1)

    def second(implementation):
        def slope(R):
            return jax.grad(lambda R: jnp.sum(jnp.sin(call(gates, R, bias, state, implementation=implementation)[0])))(
                R
            )

        return jax.jit(jax.grad(lambda R: jnp.sum(slope(R) ** 2)))(R)

    np.testing.assert_allclose(second("xla"), second("reference"), rtol=1e-4, atol=1e-4)


def test_memory_of_a_training_step():
    """Beside its inputs and gradients: the gates by time twice, and h, dh; no state but those of one chunk."""
    B, T, H, P = 2, 512, 4, 32
    gates = (jax.ShapeDtypeStruct((B, T, H, P), jnp.float32),) * 4
    rest = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, H, P, P), (4, H, P))]

    def loss(gates, R, bias):
        return jnp.sum(call(gates, R, bias, implementation="xla")[0] ** 2)

    analysis = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(gates, *rest).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 12 * B * T * H * P * 4


def test_wrong_shapes_are_named():
    gates, R, bias, state = arguments(2, 3)
    with pytest.raises(ValueError, match=r"slstm: R has shape \(4, 2, 3, 2\), expected \[4, H=2, P=3, P=3\]"):
        call(gates, R[..., :2], bias)
    with pytest.raises(ValueError, match=r"slstm: initial_state\[3\] has shape \(1, 2, 3\)"):
        call(gates, R, bias, (*state[:3], state[3][:1]))


def test_xla_refuses_float64():
    with jax.enable_x64(True):
        gates, R, bias = (jnp.zeros((1, 2, H, P), float),) * 4, jnp.zeros((4, H, P, P)), jnp.zeros((4, H, P))
        with pytest.raises(ValueError, match=r"'xla' computes in float32.*use 'reference'"):
            call(gates, R, bias, implementation="xla")


def kernel(gates, R, bias, state, segment_ids):
    i, f, z, o = gates
    return slstm_tpu(i, f, z, o, R, bias, state, starts(segment_ids), rows=16)


def test_the_kernel_over_blocks_of_the_batch_heads_and_time(monkeypatch):
    """Blocks that none of the suite's sizes fill: two of the batch, each head its own, three chunks, the last short."""
    monkeypatch.setattr(tpu_blocks, "BATCH", 8)
    monkeypatch.setattr(tpu_blocks, "VMEM", 2 << 20)
    gates, R, bias, state = arguments(9, 5)
    sizes = tpu_blocks.Sizes.of(gates[0], jnp.float32, 16, True)
    assert (sizes.padded_B // sizes.rows, sizes.heads, sizes.N) == (2, 1, 3)
    segment_ids = jnp.arange(45).reshape(9, 5) // 7

    def both(run):
        outputs, vjp = jax.vjp(lambda *a: run(*a, segment_ids), gates, R, bias, state)
        return outputs, vjp(jax.tree.map(jnp.sin, outputs))

    found = both(kernel)
    wanted = both(lambda *a: call(*a[:4], segment_ids=a[4], implementation="xla"))
    for leaf, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())


def test_heads_that_do_not_fit_run_elsewhere():
    """Asked for by name, the kernel raises; chosen for its chip, it steps aside and says why."""
    P = 2048
    gates = (jax.ShapeDtypeStruct((1, 8, 1, P), jnp.float32),) * 4
    rest = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 1, P, P), (4, 1, P))]
    with pytest.raises(Unfit, match="heads of 2048 cells need more than 56 MB of VMEM"):
        jax.eval_shape(lambda *a: call(*a, implementation="tpu"), gates, *rest)
    with jax.set_mesh(targets.mesh("v5e")), pytest.warns(UserWarning, match="slstm: no tpu kernel fits, so xla runs"):
        jax.eval_shape(call, gates, *rest)


def test_memory_of_a_training_step_with_the_kernel():
    """Beside arguments and gradients: gates and their gradients by time, h and dh, and the states of chunks' starts."""
    B, T, H, P = 8, 8192, 4, 256  # so many that they do not stay on the chip
    gates = (jax.ShapeDtypeStruct((B, T, H, P), jnp.bfloat16),) * 4
    rest = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, H, P, P), (4, H, P))]

    def loss(gates, R, bias):
        return jnp.sum(call(gates, R, bias)[0].astype(jnp.float32) ** 2)

    starts_of_chunks = 16 * H * P * B * T // (tpu_blocks.ROWS // B)
    used = temporaries(jax.grad(loss, argnums=(0, 1, 2)), gates, *rest)
    assert used < 10 * 2 * B * T * H * P + starts_of_chunks + 32 * H * P * P
