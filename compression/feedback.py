"""Rounding and pruning one input after another, the error of each made good by those that follow.

Of all changes of the later rows w_j of a matrix that could follow an error e in row i, - e U_ij / U_ii is the one after
which X w is nearest to what it was, where UᵀU is the inverse of H = XᵀX and U is upper triangular: GPTQ (Frantar et al.
2022, arXiv 2210.17323, algorithm 1) and SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1). Rows are
taken in blocks, so that the rows after a block are corrected by one matrix product.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128
DAMPING = 0.01
"""Of the mean of H's diagonal, added to the diagonal; ten times more until the factorization succeeds."""


def inverse_factor(moment: jax.Array) -> jax.Array:
    """Upper triangular U [K, K] with UᵀU = (H + damping)⁻¹, for the moments H [K, K]; an input never seen has H = 1."""
    seen = jnp.diag(moment) > 0
    H = jnp.where(seen[:, None] & seen, moment, 0) + jnp.diag(1.0 - seen)
    mean = jnp.sum(jnp.where(seen, jnp.diag(moment), 0)) / jnp.maximum(jnp.sum(seen), 1)

    def factor(damping: jax.Array) -> jax.Array:
        damped = H + jnp.diag(jnp.where(seen, damping * mean, 0))
        # H = M Mᵀ with M upper triangular is the Cholesky factorization of H with rows and columns reversed; U = M⁻¹.
        M = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return jax.scipy.linalg.solve_triangular(M, jnp.eye(len(H)), lower=False)

    def failed(found: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(jnp.isfinite(found[1])) & (found[0] < 1e6)

    def again(found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return 10 * found[0], factor(10 * found[0])

    damping = jnp.float32(DAMPING)
    return jax.lax.while_loop(failed, again, (damping, factor(damping)))[1]


@jax.jit
def gptq(w: jax.Array, moment: jax.Array, step: jax.Array, least: jax.Array | int, most: jax.Array | int) -> jax.Array:
    """Codes, int32 [K, N], within least … most, of which codes · step multiplies the inputs as w does.

    Inputs are taken in the order of their moments, the largest first. What is exactly zero stays so.

    Args:
        w: [K, N].
        moment: Σ xxᵀ over the inputs x, float32 [K, K].
        step: the scale of every element, [K, N].
        least: the least code, of all or of every element [K, N].
        most: the greatest, likewise.
    """
    order = jnp.argsort(-jnp.diag(moment))
    w, moment, step = w.astype(jnp.float32)[order], moment[order][:, order], step[order]
    least, most = (jnp.broadcast_to(jnp.asarray(edge, jnp.float32), w.shape)[order] for edge in (least, most))

    def start(w_BxN: jax.Array, U_BxB: jax.Array, given: tuple) -> tuple:
        return given

    def choose(i: jax.Array, w_BxN: jax.Array, U_BxB: jax.Array, given: tuple) -> tuple[jax.Array, tuple]:
        step_BxN, least_BxN, most_BxN, pruned_BxN = given
        code = jnp.clip(jnp.round(w_BxN[i] / step_BxN[i]), least_BxN[i], most_BxN[i])
        return jnp.where(pruned_BxN[i], 0, code * step_BxN[i]), given

    chosen = _sweep(w, inverse_factor(moment), (step, least, most, w == 0), min(BLOCK, len(w)), start, choose)
    return jnp.zeros(w.shape, jnp.int32).at[order].set(jnp.round(chosen / step).astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=2)
def sparsegpt(w: jax.Array, moment: jax.Array, percent: float) -> jax.Array:
    """w [K, N] with the share of zeros in every block of inputs, of all outputs together, that hurts least."""

    def start(w_BxN: jax.Array, U_BxB: jax.Array, real_BxN: jax.Array) -> jax.Array:
        cost = jnp.where(real_BxN, jnp.square(w_BxN / jnp.diag(U_BxB)[:, None]), jnp.inf).ravel()
        count = jnp.round(percent / 100 * jnp.sum(real_BxN))
        return (jnp.argsort(jnp.argsort(cost)) < count).reshape(w_BxN.shape)

    def choose(i: jax.Array, w_BxN: jax.Array, U_BxB: jax.Array, pruned_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(pruned_BxN[i], 0, w_BxN[i]), pruned_BxN

    size = min(BLOCK, len(w))
    return _sweep(w.astype(jnp.float32), inverse_factor(moment), jnp.ones(w.shape, bool), size, start, choose)


@functools.partial(jax.jit, static_argnums=(2, 3))
def sparsegpt_groups(w: jax.Array, moment: jax.Array, keep: int, group: int) -> jax.Array:
    """w [K, N] of which `keep` of every `group` consecutive inputs of an output stay: those whose loss hurts."""

    def start(w_BxN: jax.Array, U_BxB: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.zeros(w_BxN.shape, bool)

    def choose(i: jax.Array, w_BxN: jax.Array, U_BxB: jax.Array, pruned_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = i // group * group  # a group is chosen at its first input, when all before are corrected for
        of_group = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=group)
        cost_MxN = jnp.square(of_group(w_BxN) / of_group(jnp.diag(U_BxB))[:, None])
        rank_MxN = jnp.argsort(jnp.argsort(-cost_MxN, axis=0), axis=0)
        begun_BxN = jax.lax.dynamic_update_slice_in_dim(pruned_BxN, rank_MxN >= keep, first, axis=0)
        pruned_BxN = jnp.where(i == first, begun_BxN, pruned_BxN)
        return jnp.where(pruned_BxN[i], 0, w_BxN[i]), pruned_BxN

    size = math.ceil(min(BLOCK, len(w)) / group) * group
    return _sweep(w.astype(jnp.float32), inverse_factor(moment), jnp.zeros(w.shape, bool), size, start, choose)


def _sweep(w: jax.Array, U: jax.Array, given: object, size: int, start: Callable, choose: Callable) -> jax.Array:
    """What `choose` makes of every row of w [K, N], each of what the errors of those before left of it.

    Args:
        w: [K, N].
        U: see `inverse_factor`.
        given: arrays [K, N], of which `start` gets a block's.
        size: of a block, in rows.
        start: `start(w_BxN, U_BxB, given) -> memory` of a block whose rows are corrected for all blocks before.
        choose: `choose(i, w_BxN, U_BxB, memory) -> (row_N, memory)`, where row i is corrected for all before.
    """
    K = len(w)
    rows = -(-K // size) * size
    fill = lambda leaf: jnp.pad(leaf, [(0, rows - K), *[(0, 0)] * (leaf.ndim - 1)])  # noqa: E731
    U = jnp.pad(U, (0, rows - K)) + jnp.diag(jnp.arange(rows) >= K)
    given = jax.tree.map(fill, given)

    def of_block(carry: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        w, chosen = carry
        block = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        U_BxK = block(U)
        U_BxB = block(U_BxK, axis=1)
        w_BxN = block(w)

        def of_row(i: jax.Array, carry: tuple) -> tuple:
            w_BxN, chosen_BxN, error_BxN, memory = carry
            row, memory = choose(i, w_BxN, U_BxB, memory)
            error = (w_BxN[i] - row) / U_BxB[i, i]
            w_BxN -= U_BxB[i][:, None] * error  # zero in the columns before i
            return w_BxN, chosen_BxN.at[i].set(row), error_BxN.at[i].set(error), memory

        zeros = jnp.zeros_like(w_BxN)
        memory = start(w_BxN, U_BxB, jax.tree.map(block, given))
        _, chosen_BxN, error_BxN, _ = jax.lax.fori_loop(0, size, of_row, (w_BxN, zeros, zeros, memory))
        after = jnp.arange(rows) >= first + size
        w -= jnp.where(after, U_BxK, 0).T @ error_BxN
        return (w, jax.lax.dynamic_update_slice_in_dim(chosen, chosen_BxN, first, axis=0)), None

    w = fill(w)
    (_, chosen), _ = jax.lax.scan(of_block, (w, jnp.zeros_like(w)), jnp.arange(0, rows, size))
    return chosen[:K]
