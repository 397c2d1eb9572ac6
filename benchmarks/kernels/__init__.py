"""Kernels measured on a GPU or compiled without one: `python -m bitknap.benchmarks.kernels`."""
