"""Eight virtual CPU devices; quick compilation, cached beyond the run.

Tests compile much and compute little, so the compiler optimises little; a test of what the optimised program does
(its memory) takes the `optimised` fixture.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is here for its compiler; do not look for a chip
# A virtual device whose thread the machine starves delays a collective operation, which must not end the process.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimised():
    """The compiler as users have it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
