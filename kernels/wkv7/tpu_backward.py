"""WKV-7 for TPU: the backward kernel.

The grid is that of the forward kernel with time in reverse and the gradient of the state in VMEM. A chunk is computed
again from its inputs and the state at its start, then differentiated by hand. With G = c dS the gradient of what the
end of the chunk adds up, and dY that of the output:

    dU = A_rbᵀ dY + b Gᵀ     Z = Tᵀ dU     dV = A_rkᵀ dY + A_akᵀ Z + k Gᵀ     dS = c (G + dYᵀ r + Zᵀ a)
    dA_ab, dA_ak = Z Uᵀ, Z Vᵀ     dA_rb, dA_rk = dY Uᵀ, dY Vᵀ     both causal
    da = dA_ab b + dA_ak k + Z S     db = dA_abᵀ a + dA_rbᵀ r + U G     and so dr and dk

The decay of token s is in every pair of a token that reads at s or later and one that wrote before s. The pairs within
the chunk are those that read at s or later less those that wrote at s or later, two sums whose difference is small.
It is exact because both have the same numbers, rounded alike.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from phyla.kernels.tpu import pallas_call
from phyla.kernels.wkv7.tpu_chunk import (
    Blocks,
    Chunk,
    Layout,
    apart,
    causal,
    chunk,
    cumsum,
    each_document,
    finish,
    matmul,
    matmul_t,
    own,
    rounded,
    t_matmul,
    together,
)


def backward(blocks: Blocks, N: int, dtype, r, log_w, k, v, a, b, resets, states, dy, d_final):
    """Gradients of the six inputs [B, T, (H, N)], in their dtypes, and of the initial state, [B, H, V, K]."""
    layout = Layout(blocks, N, v.shape, dtype, reverse=True)
    arguments = [*map(layout.pad, (r, log_w, k, v, a, b)), states, layout.pad(dy), layout.merge(d_final)]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arguments[:6], arguments[-1])]
    in_specs = [*6 * [layout.by_time], layout.by_chunk, layout.by_time, layout.whole]
    documents = resets is not None
    *gradients, d_initial = pallas_call(
        functools.partial(_kernel, layout, documents),
        tuple(results),
        *arguments,
        *([layout.documents(resets)] if documents else []),
        in_specs=[*in_specs, layout.by_document] if documents else in_specs,
        out_specs=(*6 * [layout.by_time], layout.whole),
        scratch_shapes=[layout.scratch],
        cost_estimate=layout.cost(22, 9, [*arguments, *results]),
        name="wkv7_backward",
        **layout.options,
    )
    return *map(layout.cut, gradients), layout.split(d_initial)


def _kernel(layout, documents, *refs):
    inputs, (states_ref, dy_ref, d_final_ref) = refs[:6], refs[6:9]
    documents_ref = refs[9] if documents else None
    *gradients, d_initial_ref, dS_ref = refs[10 if documents else 9 :]
    N, L, dtype = layout.N, layout.L, layout.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        dS_ref[...] = d_final_ref[...]

    def step(n, _):
        i = layout.chunks - 1 - n
        rows = pl.ds(pl.multiple_of(i * L, L), L)
        if documents:
            for ref in gradients:
                ref[rows] = jnp.zeros((L, ref.shape[1]), ref.dtype)

        def run(inside, first):
            def one(lanes):
                S = states_ref[i, :, lanes] if first is True else jnp.where(first, states_ref[i, :, lanes], 0)
                r, log_w, k, v, a, b, dy = (inside(ref[rows, lanes]) for ref in (*inputs, dy_ref))
                parts = yield from chunk(r, log_w, k, v, a, b, S, N, dtype, output=False)
                *found, dS = yield from _gradients(parts, dy.astype(jnp.float32), dS_ref[:, lanes], N, dtype)
                dS_ref[:, lanes] = dS if first is True else jnp.where(first, dS, 0)  # an earlier document has none
                for ref, x in zip(gradients, found, strict=True):
                    x = x.astype(ref.dtype)
                    ref[rows, lanes] = ref[rows, lanes] + inside(x) if documents else x

            finish(together([one(lanes) for lanes in layout.by_group]))

        each_document(documents_ref, i, L, run, reverse=True)
        return 0

    jax.lax.fori_loop(0, layout.chunks, step, 0)

    @pl.when(pl.program_id(2) == layout.steps - 1)
    def _():
        d_initial_ref[...] = dS_ref[...]


def _gradients(chunk: Chunk, dy, dS, N: int, dtype):
    """Gradients of r, log_w, k, v, a, b [L, (G, N)] and of the state at the start, given that of the one at the end."""
    L = dy.shape[0]
    U, v, S = chunk.U, chunk.v, chunk.S
    (a, r), (b, k) = (jnp.split(x, 2) for x in (chunk.reads, chunk.writes))
    dS = dS * chunk.root
    G = rounded(dS, dtype)
    ends = matmul_t(chunk.writes, apart(G, N), dtype)  # b Gᵀ and k Gᵀ
    yield
    dU = own(t_matmul(chunk.by_b[L:], dy, dtype), N) + ends[:L]
    yield
    Z = rounded(own(t_matmul(chunk.inverse, dU, dtype), N), dtype)
    yield
    Z_and_dy = jnp.concatenate([Z, dy])
    d_by_b = causal(matmul_t(Z_and_dy, apart(U, N), dtype), L)
    yield
    d_by_k = causal(matmul_t(Z_and_dy, apart(v, N), dtype), L)
    yield
    d_reads = matmul(Z_and_dy, apart(S, N), dtype)
    yield
    d_reads += matmul(d_by_b, apart(b, N), dtype)
    yield
    d_reads += matmul(d_by_k, apart(k, N), dtype)
    yield
    db, dk = (own(t_matmul(x, chunk.reads, dtype), N) for x in (d_by_b, d_by_k))
    yield
    dv = own(t_matmul(chunk.by_k, Z_and_dy, dtype), N) + ends[L:]
    yield
    dS += own(t_matmul(Z_and_dy, chunk.reads, dtype), N)
    yield
    db_at_end, dk_at_end = jnp.split(matmul(jnp.concatenate([U, v]), apart(G, N), dtype), 2)
    yield
    da, dr = jnp.split(d_reads, 2)
    before, now, back = chunk.scales
    past = a * da
    reading = cumsum(r * dr + past - b * db - k * dk, reverse=True) - past
    written = b * db_at_end + k * dk_at_end
    d_log_w = reading + cumsum(written) - written + jnp.sum(G * S, axis=0, keepdims=True)
    return dr * now, d_log_w, (dk + dk_at_end) * back, dv, da * before, (db + db_at_end) * back, dS * chunk.root
