"""Sparse measurements against dense profiling: `python -m bitknap.benchmarks.profiling`."""
