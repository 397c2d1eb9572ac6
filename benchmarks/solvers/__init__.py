"""Solvers compared on real and random instances: `python -m bitknap.benchmarks.solvers`."""
