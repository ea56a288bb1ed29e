"""Benchmarks: ratios measured in one run, interleaved, as medians; machines are noisy."""

BATCH, LENGTH = 4, 512
"""Sequences of a training step and of a prefill, and tokens of each."""
