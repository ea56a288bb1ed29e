"""Which devices a command computes on: decided before JAX starts."""

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phyla.training.config import Experiment


def use_all_cores(batch_size: int) -> None:
    """Makes one virtual CPU device per core, as far as they divide the batch, before JAX starts.

    Data parallelism over them keeps every core busy where the operations of one device do not. It leaves a number
    that the user set (XLA_FLAGS or JAX_NUM_CPU_DEVICES) alone, and changes nothing where the devices are not CPUs.
    """
    import jax

    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not forced and jax.config.jax_num_cpu_devices == -1:
        cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
        jax.config.update("jax_num_cpu_devices", math.gcd(batch_size, cores))


def sequences(experiment: "Experiment") -> int:
    """That are computed at one time, over all devices."""
    return experiment.loop.batch_size // experiment.loop.microbatches
