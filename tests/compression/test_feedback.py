"""Methods that read text, against numpy in float64 written from the papers' other form: the inverse itself, updated."""

import jax.numpy as jnp
import numpy as np
import pytest

from phyla.compression.feedback import DAMPING, gptq, inverse_factor, sparsegpt, sparsegpt_groups

K, N = 150, 6  # more than a block


def problem(seed: int = 0):
    """A matrix, and the moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 30)) @ rng.standard_normal((30, K)) + rng.standard_normal((400, K))
    return rng.standard_normal((K, N)), x, x.T @ x


def brain_surgeon(W, moment, choose):
    """Optimal brain surgery in a fixed order: after each row the inverse of the remaining H, by elimination."""
    W, chosen = W.copy(), np.zeros_like(W)
    inverse = np.linalg.inv(moment + DAMPING * np.mean(np.diag(moment)) * np.eye(len(W)))
    for i in range(len(W)):
        chosen[i] = choose(i, W, inverse)
        error = (W[i] - chosen[i]) / inverse[i, i]
        W -= inverse[:, i : i + 1] * error
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return chosen


def error(x, W, chosen):
    return np.linalg.norm(x @ (chosen - W)) / np.linalg.norm(x @ W)


def test_the_factor_is_of_the_inverse():
    _, _, moment = problem()
    U = np.asarray(inverse_factor(jnp.asarray(moment, jnp.float32)), np.float64)
    assert np.array_equal(U, np.triu(U))
    damped = moment + DAMPING * np.mean(np.diag(moment)) * np.eye(K)
    np.testing.assert_allclose(U.T @ U @ damped, np.eye(K), atol=2e-3)


def test_gptq_is_optimal_brain_surgery_in_the_order_of_the_inputs_moments():
    W, x, moment = problem()
    step = np.abs(W).max(0) / 7
    order = np.argsort(-np.diag(moment))
    expected = np.zeros((K, N))
    expected[order] = brain_surgeon(
        W[order], moment[order][:, order], lambda i, W, _: np.clip(np.round(W[i] / step), -8, 7) * step
    )
    given = (
        jnp.asarray(W, jnp.float32),
        jnp.asarray(moment, jnp.float32),
        jnp.asarray(np.tile(step, (K, 1)), jnp.float32),
    )
    codes = np.asarray(gptq(*given, -8, 7))
    assert np.mean(codes == np.round(expected / step)) > 0.99  # one that lies between two codes may go either way
    nearest = np.round(W / step) * step
    assert error(x, W, codes * step) < 0.75 * error(x, W, nearest)
    assert error(x, W, codes * step) == pytest.approx(error(x, W, expected), rel=0.02)


def test_gptq_rounds_to_nearest_what_no_text_tells_of_and_leaves_zeros():
    W, _, moment = problem()
    W[::3] = 0
    step = np.full((K, N), 0.3, np.float32)
    codes = np.asarray(gptq(jnp.asarray(W, jnp.float32), jnp.zeros((K, K)), jnp.asarray(step), -8, 7))
    np.testing.assert_array_equal(codes, np.clip(np.round(np.float32(W) / step), -8, 7))
    codes = np.asarray(gptq(jnp.asarray(W, jnp.float32), jnp.asarray(moment, jnp.float32), jnp.asarray(step), -8, 7))
    assert not codes[::3].any()


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 3), (3, 8)])
def test_sparsegpt_keeps_n_of_m(keep, group):
    W, x, moment = problem()
    kept = np.zeros((group, N), bool)

    def choose(i, W, inverse):
        if i % group == 0:
            remaining = inverse[i:, i:]
            U = np.linalg.cholesky(remaining).T  # the rows of the factor as the papers have them
            part = slice(i, i + group)
            cost = (W[part] / np.diag(U)[: len(W[part]), None]) ** 2
            kept[: len(cost)] = np.argsort(np.argsort(-cost, axis=0), axis=0) < keep
        return np.where(kept[i % group], W[i], 0)

    expected = brain_surgeon(W, moment, choose)
    found = np.asarray(sparsegpt_groups(jnp.asarray(W, jnp.float32), jnp.asarray(moment, jnp.float32), keep, group))
    whole = K // group * group
    assert (np.count_nonzero(found[:whole].reshape(-1, group, N), axis=1) == keep).all()
    assert np.mean((found != 0) == (expected != 0)) > 0.99
    assert error(x, W, found) == pytest.approx(error(x, W, expected), rel=0.05)
    rank = np.argsort(np.argsort(-np.abs(W[:whole]).reshape(-1, group, N), axis=1), axis=1)
    magnitude = W.copy()
    magnitude[:whole] *= (rank < keep).reshape(-1, N)
    assert error(x, W, found) < 0.75 * error(x, W, magnitude)


def test_sparsegpt_zeroes_a_share_of_every_block():
    W, x, moment = problem()
    found = np.asarray(sparsegpt(jnp.asarray(W, jnp.float32), jnp.asarray(moment, jnp.float32), 50.0))
    assert np.count_nonzero(found[:128]) == 64 * N
    assert np.count_nonzero(found[128:]) == 11 * N
    magnitude = np.where(np.abs(W) < np.median(np.abs(W)), 0, W)
    assert error(x, W, found) < 0.75 * error(x, W, magnitude)


def test_gptq_of_bounds_that_differ():
    """As with zero points: every code within its own element's bounds, as the plain form has it."""
    W, _, moment = problem()
    step = np.tile(np.ptp(W, axis=0) / 7, (K, 1))
    zero = np.round(-W.min(0) / step) - 4
    least, most = -4 - zero, 3 - zero
    order = np.argsort(-np.diag(moment))
    expected = np.zeros((K, N))
    expected[order] = brain_surgeon(
        W[order],
        moment[order][:, order],
        lambda i, W, _: np.clip(np.round(W[i] / step[0]), least[0], most[0]) * step[0],
    )
    given = (jnp.asarray(a, jnp.float32) for a in (W, moment, step, least, most))
    codes = np.asarray(gptq(*given))
    assert np.mean(codes == np.round(expected / step)) > 0.99
    assert (codes >= least).all()
    assert (codes <= most).all()
    assert ((codes == least) | (codes == most)).any()
