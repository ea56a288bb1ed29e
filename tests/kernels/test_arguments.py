"""Bad arguments of an op are one clear line; the choice of an implementation."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from phyla.kernels.causal_conv import causal_conv
from phyla.kernels.dispatch import resolve
from phyla.kernels.segments import starts
from phyla.kernels.selective_scan import selective_scan


def scan_arguments(**changes) -> dict[str, Any]:
    B, T, D, N = 2, 3, 4, 5
    arguments = {"x": (B, T, D), "dt": (B, T, D), "A": (D, N), "B": (B, T, N), "C": (B, T, N), "D": (D,)}
    return {key: jnp.zeros(shape) for key, shape in (arguments | changes).items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dt": (2, 7, 4)}, r"selective_scan: dt has shape \(2, 7, 4\), expected \[B=2, T=3, D=4\]"),
        ({"A": (5, 4)}, r"A has shape \(5, 4\), expected \[D=4, N\]"),
        ({"C": (2, 3, 1)}, r"C has shape \(2, 3, 1\), expected \[B=2, T=3, N=5\]"),
        ({"x": (2, 0, 4)}, r"x has shape \(2, 0, 4\), expected \[B, T, D\] with sizes >= 1"),
        ({"x": (3, 4)}, r"x has shape \(3, 4\), expected \[B, T, D\]"),
        ({"initial_state": (2, 5, 4)}, r"initial_state has shape \(2, 5, 4\), expected \[B=2, D=4, N=5\]"),
        ({"segment_ids": (2, 3)}, r"segment_ids has dtype float32, expected a dtype that is integer"),
    ],
)
def test_selective_scan_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**scan_arguments(**changes))


def test_selective_scan_refuses_integers():
    arguments = scan_arguments()
    arguments["x"] = jnp.zeros((2, 3, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"x has dtype int32, expected a dtype that is floating"):
        selective_scan(**arguments)


def test_causal_conv_refuses_a_state_of_another_width():
    with pytest.raises(ValueError, match=r"causal_conv: initial_state has shape \(2, 4, 4\), expected \[2, 3, 4\]"):
        causal_conv(jnp.zeros((2, 3, 4)), jnp.zeros((4, 4)), initial_state=jnp.zeros((2, 4, 4)))


@pytest.mark.parametrize(("W", "T"), [(1, 3), (4, 1), (4, 2), (2, 5)])
def test_causal_conv_of_any_width_and_no_bias(W, T):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(1, T, 2)).astype(np.float32), rng.normal(size=(W, 2)).astype(np.float32)
    y, state = causal_conv(jnp.asarray(x), jnp.asarray(weight))
    for d in range(2):
        np.testing.assert_allclose(y[0, :, d], np.convolve(x[0, :, d], weight[::-1, d])[:T], atol=1e-6)
    np.testing.assert_array_equal(state, np.pad(x, ((0, 0), (W - 1, 0), (0, 0)))[:, T:])


def test_the_best_implementation_for_the_backend():
    choices = {"reference": min, "xla": max, "tpu": sum, "gpu": len}
    assert resolve("op", None, choices) is max  # the tests run on a CPU
    assert resolve("op", None, {"reference": min}) is min
    assert resolve("op", None, choices | {"cpu": abs}) is abs
    assert resolve("op", "gpu", choices) is len


def test_unknown_implementation():
    message = r"selective_scan: unknown implementation 'xl'; did you mean 'xla'\? Choices here: reference, xla"
    with pytest.raises(ValueError, match=message):
        selective_scan(**scan_arguments(), implementation="xl")
    with pytest.raises(ValueError, match="causal_conv: unknown implementation 'tpu'"):
        causal_conv(jnp.zeros((1, 2, 3)), jnp.zeros((4, 3)), implementation="tpu")


def test_starts():
    ids = jnp.asarray([[3, 3, 1, 3], [0, 0, 0, 0]])
    np.testing.assert_array_equal(starts(ids), [[False, False, True, True], [False] * 4])
