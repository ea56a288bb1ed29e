"""What is said of the vectors that matrices multiply."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kurtosis

from phyla.compression.calibrate import Columns
from phyla.training.activations import activations


def test_the_worst_of_a_stack():
    """Against scipy, whose kurtosis is around the mean; here that is nearly zero."""
    x = np.random.default_rng(0).standard_normal((2, 5000, 8))
    x[1] *= np.array([1, 1, 1, 20, 1, 1, 9, 0])
    a = np.abs(x)
    rows = (a.sum(1), (a**2).sum(1), (a**4).sum(1), (a >= 6).sum(1), np.full((2, 8), 5000), a.max(1))
    columns = Columns(*(jnp.asarray(row, jnp.float32) for row in rows))
    path = ("periods", "blocks", 0, "mixer", "q", "weight", "body")
    (found,) = activations({path: columns}, lambda path: path[3]).items()
    assert found[0] == "periods.blocks.0.mixer.q.weight"
    assert found[1]["kurtosis"] == pytest.approx(kurtosis(x[1].ravel(), fisher=False), rel=1e-2)
    assert found[1]["largest"] == pytest.approx(a[1].max())
    assert found[1]["layer"] == "mixer"
    assert (found[1]["outliers"], found[1]["inputs"]) == (2, 8)
