"""What a text says of the inputs of each matrix, against numpy in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phyla import configs
from phyla.compression.calibrate import Columns, moments
from phyla.compression.matrices import dotted, places, replace, weights
from phyla.models.weights import Weight, materialize
from tests.compression.test_compress import batches, built


class Noted(Weight):
    """A dense matrix that calls the host with what it multiplies."""

    def __init__(self, dense: jax.Array, note):
        self.dense = nnx.Variable(dense)
        count = math.prod(dense.shape[:-2])
        self.number = nnx.Variable(jnp.arange(count).reshape(dense.shape[:-2]))  # of each matrix of the stack
        self.note = note

    @property
    def shape(self):
        return self.dense.shape

    def materialize(self):
        return self.dense[...]

    def matmul(self, x):
        jax.debug.callback(self.note, self.number[...], x)
        return x @ self.dense[...]

    def grouped_matmul(self, x, sizes):
        jax.debug.callback(self.note, self.number[...], x, sizes)
        return super().grouped_matmul(x, sizes)


@pytest.mark.parametrize(("family", "groups"), [*((family, None) for family in configs.SMALL), ("transformer", 1)])
def test_moments_are_those_of_what_each_matrix_multiplies(family, groups):
    """Against the vectors themselves, in float64. Where layers share a matrix, its uses' maxima are added."""
    found = moments(built(family, groups), batches())
    assert found.keys() == {place.path for place in places(built(family)) if place.kind == "matrix"}
    model = nnx.clone(built(family, groups))
    expected = {path: np.zeros((math.prod(moment.shape[:-2]), *moment.shape[-2:])) for path, moment in found.items()}
    figures = {path: np.zeros((len(Columns._fields), *moment.shape[:-1])) for path, moment in expected.items()}

    def add(path, number, x, sizes=None):
        rows = np.split(np.float64(x).reshape(-1, x.shape[-1]), np.cumsum(sizes)[:-1] if sizes is not None else [])
        for n, x in zip(np.ravel(number), rows, strict=True):
            expected[path][n] += x.T @ x
            a = np.abs(x)
            figures[path][:-1, n] += np.stack([a, a**2, a**4, a >= 6, np.ones_like(a)]).sum(1)
            figures[path][-1, n] = np.maximum(figures[path][-1, n], a.max(0, initial=0))

    for path in found:
        replace(model, path, Noted(materialize(weights(model)[path]), functools.partial(add, path)))
    for tokens, segment_ids in batches():
        nnx.jit(lambda model, *given: model.forward(*given).hidden)(model, tokens, None, segment_ids)
    jax.effects_barrier()
    uses = 1 if groups is None else built(family).config.repeats // groups
    for path, moment in found.items():
        close = {"rtol": 1e-3, "atol": 1e-4 * expected[path].max(), "err_msg": dotted(path)}
        np.testing.assert_allclose(moment, expected[path].reshape(moment.shape), **close)
        *sums, largest = (value.reshape(moment.shape[:-1]) for value in figures[path])
        columns = found.columns[path]
        for sum_, value in zip(columns[:-1], sums, strict=True):
            np.testing.assert_allclose(sum_, value, rtol=1e-3, atol=1e-4 * value.max(), err_msg=dotted(path))
        if uses == 1:
            np.testing.assert_allclose(columns.largest, largest, rtol=1e-4, err_msg=dotted(path))
        else:
            assert (largest * 0.999 <= columns.largest).all()
            assert (columns.largest <= largest * 1.001 * uses).all()
