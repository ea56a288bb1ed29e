"""`phyla`, and `python -m phyla`."""

import os
import sys
from glob import glob

from phyla.cli import main

HUGE_PAGES = "glibc.malloc.hugetlb=1"
CHIPS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
"""The files of TPUs and GPUs on Linux."""


def look_for_no_chip() -> None:
    """Tells JAX to use the CPU on a machine that has nothing else; a user who set JAX_PLATFORMS decides.

    The TPU compiler (libtpu) may be installed without a TPU, and then warns at length that there is none.
    """
    if sys.platform == "linux" and not any(map(glob, CHIPS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run() -> None:
    """The command in a process whose memory is in huge pages: page faults are a quarter of a training step on a CPU.

    The allocator reads this setting when a process starts, so the process replaces itself once. Whoever sets
    GLIBC_TUNABLES decides instead; help and errors in the command's name do not wait for it.
    """
    heavy = len(sys.argv) > 2 or sys.argv[1:] == ["compare"]
    look_for_no_chip()
    if sys.platform == "linux" and heavy and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


if __name__ == "__main__":
    run()
