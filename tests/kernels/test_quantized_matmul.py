"""Quantized matmul against numpy in float64, in every implementation and format; NF4 against bitsandbytes' scheme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phyla.kernels import quantized_matmul as ops
from phyla.kernels.dispatch import Unfit
from phyla.kernels.quantized_matmul import quantized_matmul, tpu, tpu_nf4
from phyla.kernels.quantized_matmul.nf4 import CODE_BOOK, dynamic_value
from phyla.kernels.quantized_matmul.packing import unpack
from phyla.training import targets

# JAX writes programs for absent chips to its cache, and cannot read them.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
COLUMNS = np.array([3, 40, 1000], np.int32)  # the last is padding
QUANTIZE = {
    "int8": ops.quantize_int8,
    "dynamic int8": functools.partial(ops.quantize_int8, dynamic=True),
    "float8": ops.quantize_float8,
    "dynamic float8": functools.partial(ops.quantize_float8, dynamic=True),
    "int4": functools.partial(ops.quantize_int4, group=64),
    "int4 with zeros": functools.partial(ops.quantize_int4, group=32, symmetric=False),
    "int4 of one group": functools.partial(ops.quantize_int4, group=1024),
    "nf4": ops.quantize_nf4,
    "LLM.int8": lambda w: ops.quantize_llm_int8(w, jnp.asarray(COLUMNS)),
    "nf4 with outliers": lambda w: ops.quantize_outliers(w, jnp.asarray(COLUMNS), ops.quantize_nf4),
    "int8 of one scale": functools.partial(ops.quantize_int8, tensor=True),
    "float8 of one scale": functools.partial(ops.quantize_float8, tensor=True),
    "int4 of one scale": functools.partial(ops.quantize_int4, tensor=True, symmetric=False),
}
NO_KERNEL = {
    "int3": functools.partial(ops.quantize_int3, group=40),
    "int3 of one group": functools.partial(ops.quantize_int3, group=None),
    "int2 with zeros": functools.partial(ops.quantize_int2, group=32, symmetric=False),
    "int2 of large groups": functools.partial(ops.quantize_int2, group=520),
    "int8 with zeros": functools.partial(ops.quantize_codes, bits=8, group=32, symmetric=False),
}
"""Those that XLA alone multiplies."""
ALL = QUANTIZE | NO_KERNEL
SIZES = {  # K, N, M, dtype
    "one block": (64, 128, 3, "bfloat16"),
    "an odd one": (37, 9, 1, "float32"),
    "several and a rest": (600, 5, 33, "float32"),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def matrix(K, N, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((K, N)), jnp.float32)


def inputs(M, K, N, dtype):
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((M, K), (M, N)))
    return x.at[:, 3].multiply(30), g  # a column of outliers


def dense(w):
    """The matrix in float64, from the leaves, one element's formula at a time."""
    if isinstance(w, ops.Outliers):
        found = dense(w.body)
        for column, values in zip(np.asarray(w.columns), np.asarray(w.values, np.float64), strict=True):
            if column < len(found):
                found[column] = values
        return found
    if isinstance(w, ops.Int8 | ops.Float8):
        return np.asarray(w.codes, np.float64) * np.asarray(w.scale, np.float64)
    codes, (K, N) = np.asarray(w.codes), w.shape
    number = np.array([numbers(codes, k, w.bits) for k in range(K)], int)
    group = np.arange(K) // w.group
    if isinstance(w, ops.NF4):
        order = np.arange(N) * len(w.scale_codes) + np.arange(len(w.scale_codes))[:, None]  # by column, then down it
        scale = DYNAMIC_MAP[np.asarray(w.scale_codes)] * np.asarray(w.scale_scales, np.float64)[order // 256]
        return CODE_BOOK.astype(np.float64)[number] * (scale + float(w.scale_mean))[group]
    number = np.where(number >= 1 << w.bits - 1, number - (1 << w.bits), number)
    of_row = lambda a: np.asarray(a, np.float64)[group] if a.ndim else float(a)  # noqa: E731
    return (number - (0 if w.zero is None else of_row(w.zero))) * of_row(w.scale)


def numbers(codes, k, bits):
    """Row k of packed codes."""
    if bits == 3:
        of_eight = codes[k // 8 * 3 :]
        return (of_eight[k % 8 // 4] >> 2 * (k % 4) & 3) + 4 * (of_eight[2] >> k % 8 & 1)
    of_byte = 8 // bits
    return codes[k // of_byte] >> bits * (k % of_byte) & (1 << bits) - 1


def dynamic_map():
    """bitsandbytes' signed map of 8 bits with 7 of exponent."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *-middles]
    return np.sort(values)


DYNAMIC_MAP = dynamic_map()


def expected(x, w, g):
    """y and dx in float64; a dynamic format rounds x by row, without the outliers' columns.

    Scales and codes are those of float32: halfway between two codes, float64 may choose the other one.
    """
    x, g, W = np.asarray(x, np.float64), np.asarray(g, np.float64), dense(w)
    body, outer = w, np.zeros(len(W), bool)
    if isinstance(w, ops.Outliers):
        body, outer = w.body, np.isin(np.arange(len(W)), COLUMNS)
    inner = np.where(outer, 0, x)
    if getattr(body, "dynamic", False):
        most = 127 if isinstance(body, ops.Int8) else 448
        inner = inner.astype(np.float32)
        scale = np.abs(inner).max(1, keepdims=True) * np.float32(1 / most)
        codes = inner / scale
        inner = scale.astype(np.float64) * (np.round(codes) if most == 127 else codes.astype(jnp.float8_e4m3fn))
    return inner @ W + np.where(outer, x, 0) @ W, g @ W.T


def close(found, exact, dtype):
    for a, b in zip(found, exact, strict=True):
        scale = np.sqrt(np.mean(b**2))
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, b / scale, atol=TOLERANCE[dtype], rtol=8e-3 * (dtype == "bfloat16")
        )


def both(call, x, g):
    """y and the gradient for x."""

    @jax.jit
    def run(x, g):
        y, pullback = jax.vjp(call, x)
        return y, *pullback(g)

    return run(x, g)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("quantize", ALL.values(), ids=ALL)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_product_and_gradient(implementation, quantize, size):
    K, N, M, dtype = size
    w = jax.jit(quantize)(matrix(K, N))
    assert w.shape == (K, N)
    x, g = inputs(M, K, N, dtype)
    found = both(lambda x: quantized_matmul(x, w, implementation=implementation), x, g)
    assert all(a.dtype == dtype for a in found)
    close(found, expected(x, w, g), dtype)


@pytest.mark.parametrize("quantize", QUANTIZE.values(), ids=QUANTIZE)
def test_tpu_kernels(quantize):
    """Few rows and many, over several blocks in every dimension, the last of the columns incomplete."""
    K, N = 256, 200
    w = jax.jit(quantize)(matrix(K, N))
    block = tpu.Block(16, 128, 128)
    for M, dtype in ((3, "float32"), (40, "bfloat16")):
        x, g = inputs(M, K, N, dtype)
        found = jax.jit(lambda x, g: (tpu.product(x, w, block=block), tpu.transposed(g, w, block=block)))(x, g)
        close(found, expected(x, w, g), dtype)


@pytest.mark.parametrize(
    ("name", "M", "dtype"),
    [
        ("int8", 1, "float32"),
        ("int8", 70, "bfloat16"),
        ("dynamic int8", 70, "float32"),
        ("LLM.int8", 3, "bfloat16"),
        ("dynamic float8", 3, "bfloat16"),
        ("int4 with zeros", 1, "bfloat16"),
        ("int4 with zeros", 70, "float32"),
        ("int4 of one group", 3, "float32"),
        ("nf4", 3, "float32"),
        ("nf4", 70, "bfloat16"),
        ("nf4 with outliers", 3, "bfloat16"),
    ],
)
def test_gpu_kernels(name, M, dtype):
    """Few rows and many, over several blocks of the matrix in either dimension, the last of them incomplete."""
    check_gpu(name, 140, 150, M, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("K", "N", "M"), [(64, 128, 1), (37, 9, 33), (600, 300, 65), (1023, 129, 200)])
@pytest.mark.parametrize("name", QUANTIZE)
def test_more_gpu_kernels(name, K, N, M, dtype):
    check_gpu(name, K, N, M, dtype)


def check_gpu(name, K, N, M, dtype):
    w = jax.jit(QUANTIZE[name])(matrix(K, N))
    x, g = inputs(M, K, N, dtype)
    found = both(functools.partial(quantized_matmul, w=w, implementation="gpu"), x, g)
    assert all(a.dtype == dtype for a in found)
    close(found, expected(x, w, g), dtype)


def test_rounding_to_nearest():
    """Half a step is the largest error; what is scaled to the largest code is exact."""
    W = matrix(600, 5)
    int8, int4 = (jax.jit(QUANTIZE[name])(W) for name in ("int8", "int4"))
    others = [jax.jit(ALL[name])(W) for name in ("int4 with zeros", *NO_KERNEL)]
    assert np.all(np.abs(int8.materialize() - W) <= 0.5001 * int8.scale)
    for w in (int4, *others):
        assert np.all(np.abs(w.materialize() - W) <= 0.5001 * np.repeat(w.scale, w.group, 0)[:600])
    at = np.abs(W).argmax(0), np.arange(5)
    for w in (int8, int4):
        np.testing.assert_allclose(np.abs(w.materialize()[at]).max(), np.abs(W[at]).max(), rtol=1e-6)
    for quantize in ALL.values():
        assert np.all(jax.jit(lambda w, quantize=quantize: quantize(w).materialize())(W * 0) == 0)


@pytest.mark.parametrize("quantize", ALL.values(), ids=ALL)
def test_single_columns(quantize):
    """As an embedding looks them up: in any order, one more than once, the last with an incomplete block of scales."""
    w = jax.jit(quantize)(matrix(300, 61))
    columns = np.array([60, 3, 3, 0, 51])
    found = jax.jit(lambda w: w.take_columns(jnp.asarray(columns)))(w)
    np.testing.assert_allclose(found, dense(w)[:, columns], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"group": 32}, {"group": 32, "symmetric": False}, {"tensor": True}], ids=str)
def test_clipping_for_the_least_squared_error(options):
    """Against a search over the same ratios in float64; better than the whole range in every group."""
    W = matrix(96, 7)
    W64 = np.asarray(W, np.float64)
    groups = [W64] if "tensor" in options else [W64[k : k + 32, n] for k in range(0, 96, 32) for n in range(7)]
    symmetric = options.get("symmetric", True)
    for bits in (2, 3, 4):
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        found, whole = (
            dense(jax.jit(functools.partial(ops.quantize_codes, bits=bits, least_squares=clip, **options))(W))
            for clip in (True, False)
        )
        error = 0.0
        for w in groups:
            tried = []
            for r in 1 - np.arange(40) / 50:
                if symmetric:
                    scale, zero = r * np.abs(w).max() / most, 0
                else:
                    low, high = r * min(w.min(), 0), r * max(w.max(), 0)
                    scale = (high - low) / (most - least)
                    zero = np.clip(np.round(-low / scale), 0, most - least) + least
                code = np.clip(np.round(w / scale) + zero, least, most)
                tried.append(np.square((code - zero) * scale - w).sum())
            error += min(tried)
        np.testing.assert_allclose(np.square(found - W64).sum(), error, rtol=1e-4)
        assert np.square(found - W64).sum() < (0.9 if bits < 4 else 0.98) * np.square(whole - W64).sum()


def test_bits_per_weight():
    W = jax.ShapeDtypeStruct((3, 1024, 256), jnp.float32)
    for name, bits in {
        "int8": 8 + 32 / 1024,
        "float8": 8 + 32 / 1024,
        "int4": 4 + 32 / 64,
        "int4 with zeros": 4 + 40 / 32,
        "int4 of one scale": 4 + 40 / (1024 * 256),
        "int8 of one scale": 8 + 32 / (1024 * 256),
        "int3": 3 + 26 * 32 / 1024,
        "int2 with zeros": 2 + 40 / 32,
        "nf4": 4 + 8 / 64 + 32 / (64 * 256) + 32 / (1024 * 256),
        "LLM.int8": 8 + 32 / 1024 + 3 * 32 / 1024 + 3 * 32 / (1024 * 256),
    }.items():
        w = jax.eval_shape(jax.vmap(ALL[name]), W)
        assert w.shape == W.shape
        np.testing.assert_allclose(w.bits_per_weight, bits)
        np.testing.assert_allclose(w.nbytes, bits * W.size / 8)


def test_nf4_is_that_of_bitsandbytes():
    """Blocks of 64 of the matrix stored as [out, in], their scales less the mean in a map of 8 bits, by 256."""
    K, N = 192, 200
    W = np.asarray(matrix(K, N)) * np.exp(np.random.default_rng(2).standard_normal(N))
    w = jax.jit(ops.quantize_nf4)(jnp.asarray(W, jnp.float32))
    blocks = W.T.astype(np.float32).reshape(-1, 64)
    scale = np.abs(blocks).max(1)
    nearest = np.abs((blocks / scale[:, None])[..., None] - CODE_BOOK).argmin(-1)
    np.testing.assert_array_equal(np.asarray(unpack(w.codes)), nearest.reshape(N, K).T)
    centred = np.pad(scale - scale.mean(dtype=np.float32), (0, -len(scale) % 256)).reshape(-1, 256)
    scales = np.abs(centred).max(1)
    codes = np.abs((centred / scales[:, None])[..., None] - DYNAMIC_MAP).argmin(-1)
    found = (DYNAMIC_MAP[codes] * scales[:, None]).ravel()[: len(scale)] + scale.mean(dtype=np.float64)
    values = (CODE_BOOK[nearest] * found[:, None]).reshape(N, K).T
    np.testing.assert_allclose(w.materialize(), values, atol=1e-6 * np.abs(values).max())
    np.testing.assert_allclose(dynamic_value(jnp.arange(256, dtype=jnp.uint8)), DYNAMIC_MAP, rtol=1e-6, atol=1e-12)


def test_nf4_on_a_tpu_is_the_table():
    """All sixteen quantiles, bit by bit in either dtype, and all 256 codes of the scales."""
    number = jnp.arange(16)[:, None] * jnp.ones((1, 5), jnp.int32)
    number = jnp.where(number > 7, number - 16, number)
    scale = jnp.asarray(np.random.default_rng(0).uniform(1e-6, 3, (1, 5)), jnp.float32)
    values = jnp.asarray(CODE_BOOK)[:, None] * scale
    for dtype in map(jnp.dtype, TOLERANCE):
        found = jax.jit(functools.partial(tpu_nf4.quantiles, dtype=dtype))(number, scale)
        np.testing.assert_array_equal(found.astype(dtype), values.astype(dtype))
    codes = jnp.arange(256, dtype=jnp.uint8)[:, None]
    found = jax.jit(tpu_nf4.scales)(codes, scale[:, :1], jnp.zeros((1, 1)))
    np.testing.assert_allclose(found[:, 0], DYNAMIC_MAP * float(scale[0, 0]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_stacked_weights(implementation):
    """A scan over layers with its gradient, and a map over experts, are what each of the matrices gives."""
    W = jnp.stack([matrix(128, 128, seed) / 8 for seed in range(3)])
    x, g = inputs(4, 128, 128, "float32")
    multiply = functools.partial(quantized_matmul, implementation=implementation)

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (multiply(x, w), None), x, w)[0]

    def unrolled(x, w):
        return functools.reduce(lambda x, i: multiply(x, jax.tree.map(lambda leaf: leaf[i], w)), range(3), x)

    for name in ("nf4", "LLM.int8"):
        w = jax.jit(jax.vmap(QUANTIZE[name]))(W)
        close(both(functools.partial(scanned, w=w), x, g), both(functools.partial(unrolled, w=w), x, g), "float32")
        if implementation != "tpu":  # whose interpreter knows no vmap; the compiler does: test_experts_compile_for_tpu
            mapped = jax.jit(jax.vmap(multiply))(jnp.stack([x] * 3), w)
            each = [np.asarray(x) @ dense(jax.tree.map(lambda leaf, i=i: leaf[i], w)) for i in range(3)]
            if name == "nf4":
                close([mapped], [np.stack(each)], "float32")


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_divided_over_devices(implementation):
    """Rows over two devices, columns over two: the same numbers.

    The interpreter of GPU kernels cannot tell: on several devices at a time it loses its buffers, now and then.
    """
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, g = inputs(16, 128, 256, "float32")
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))  # noqa: E731
    for name in ("dynamic int8", "nf4 with outliers"):
        w = jax.jit(QUANTIZE[name])(matrix(128, 256))
        divided = jax.tree.map(lambda a: place(a, None, "tensor") if a.ndim == 2 else place(a), w)
        with jax.set_mesh(mesh):
            call = functools.partial(quantized_matmul, w=divided, implementation=implementation)
            found = both(call, place(x, "data"), place(g, "data", "tensor"))
        close(found, expected(x, w, g), "float32")


def test_dynamic_int8_is_exact():
    """Integers of up to 127 come out as they are, in every implementation and however large their sums."""
    rng = np.random.default_rng(0)
    x, W = (rng.integers(-127, 128, shape) for shape in ((40, 512), (512, 128)))
    x[:, 0], W[0] = 127, 127
    w = ops.quantize_int8(jnp.asarray(W, jnp.float32), dynamic=True)
    np.testing.assert_array_equal(w.codes, W)
    for implementation in IMPLEMENTATIONS:
        y = quantized_matmul(jnp.asarray(x, jnp.float32), w, implementation=implementation)
        np.testing.assert_array_equal(y, x @ W)


def test_outliers_spare_the_others():
    """A column of x that is 100 times the others costs them their bits, unless it is multiplied on its own."""
    W, (x, _) = matrix(256, 128), inputs(16, 256, 128, "float32")
    x = x.at[:, 40].multiply(100)
    exact = np.asarray(x, np.float64) @ np.asarray(W, np.float64)
    for implementation in IMPLEMENTATIONS:
        error = [
            np.abs(quantized_matmul(x, w, implementation=implementation) - exact).mean()
            for w in (jax.jit(QUANTIZE[name])(W) for name in ("dynamic int8", "LLM.int8"))
        ]
        assert error[1] < error[0] / 5


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "LLM.int8", "int3 of one group", "int2 with zeros", "q4_k"])
@pytest.mark.parametrize("target", ["cpu", "v5e"])
def test_a_decode_step_makes_no_dense_copy(target, name, optimised):
    """In XLA's program the dense matrix would take 2 K N or 4 K N bytes. Also backwards, and in a scan over layers."""
    K, N = 4096, 1024
    x, g = (jax.ShapeDtypeStruct((2, size), jnp.bfloat16) for size in (K, N))
    quantize = ALL.get(name) or functools.partial(ops.quantize_ggml, kind=name)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((K, N), jnp.float32))
    mesh = targets.mesh(target) if target in targets.CHIPS else jax.make_mesh((1,), ("data",))

    def one(x, w, g):
        y, pullback = jax.vjp(lambda x: quantized_matmul(x, w, implementation="xla"), x)
        return y, pullback(g)

    def several(x, w, g):
        def layer(x, w):
            return jnp.pad(quantized_matmul(x, w, implementation="xla"), ((0, 0), (0, K - N))), None

        y, pullback = jax.vjp(lambda x: jax.lax.scan(layer, x, w)[0][:, :N], x)
        return y, pullback(g)

    assert temporaries(compiled(mesh, one, x, w, g)) < K * N / 2
    stacked = jax.eval_shape(lambda w: jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), w), w)
    # Of the stack, a layer's codes may be copied as they are.
    assert temporaries(compiled(mesh, several, x, stacked, g)) < 1.5 * K * N


def compiled(mesh, call, *arguments):
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)  # noqa: E731
        return jax.jit(call).lower(*jax.tree.map(place, arguments)).compile()


def temporaries(program):
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("target", "M", "names"),
    [("v5e", 8, ("int8", "int4 with zeros", "nf4")), ("v5e", 512, ("dynamic int8", "nf4"))]
    + [pytest.param(target, M, QUANTIZE, marks=pytest.mark.slow) for target in targets.CHIPS for M in (1, 32, 4096)],
)
def test_compiles_for_tpu(target, M, names):
    """At 4096 × 14336, forward and backward: the products alone, and no more memory than x, dy and a few scales."""
    K, N = 4096, 14336
    for name in names:
        w = jax.eval_shape(QUANTIZE[name], jax.ShapeDtypeStruct((K, N), jnp.float32))
        x, g = (jax.ShapeDtypeStruct((M, size), jnp.bfloat16) for size in (K, N))

        def call(x, w, g):
            y, pullback = jax.vjp(lambda x: quantized_matmul(x, w), x)
            return y, *pullback(g)

        program = compiled(targets.mesh(target), call, x, w, g)
        assert str(program.as_text()).count('custom_call_target="tpu_custom_call"') == 2
        assert temporaries(program) <= 8 * M * (K + N) + K * N // 8


def test_experts_compile_for_tpu():
    """Each row by its own of several matrices, as a mixture's experts decode."""
    w = jax.eval_shape(jax.vmap(ops.quantize_nf4), jax.ShapeDtypeStruct((4, 256, 512), jnp.float32))
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    program = compiled(targets.mesh("v5e"), jax.vmap(quantized_matmul), x, w)
    assert 'custom_call_target="tpu_custom_call"' in str(program.as_text())


def test_unfit_sizes():
    """Rows that are not whole groups: the kernel says so if it was asked for, else XLA runs, with a warning."""
    w = ops.quantize_nf4(matrix(96, 128))
    x, _ = inputs(2, 96, 128, "float32")
    with pytest.raises(Unfit, match="96 rows in groups of 64"):
        quantized_matmul(x, w, implementation="tpu")
    with pytest.warns(UserWarning, match=r"no tpu kernel fits.*96 rows"):
        compiled(targets.mesh("v5e"), quantized_matmul, x, w)


def test_bad_input():
    w = ops.quantize_int8(matrix(8, 4))
    with pytest.raises(ValueError, match=r"x is float32 \(3, 7\), expected .* K=8"):
        quantized_matmul(jnp.ones((3, 7)), w)
    with pytest.raises(ValueError, match="x is int32"):
        w.matmul(jnp.ones((3, 8), jnp.int32))
    with pytest.raises(ValueError, match=r"\(2, 8, 4\)"):
        quantized_matmul(jnp.ones((3, 8)), jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), w))
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        quantized_matmul(jnp.ones((3, 8)), w, implementation="xl")
    with pytest.raises(Unfit, match="no kernel reads Int3"):
        quantized_matmul(jnp.ones((3, 8)), ops.quantize_int3(matrix(8, 4)), implementation="tpu")
    with pytest.raises(ValueError, match="int2: group is 6, expected a multiple of 4"):
        ops.quantize_int2(matrix(8, 4), group=6)
    with pytest.raises(ValueError, match="group is 3"):
        ops.quantize_int4(matrix(8, 4), group=3)
