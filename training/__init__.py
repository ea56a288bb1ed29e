"""Data, objectives, optimizer, step, loop, checkpoints, parallelism, evaluation, generation and comparison."""
