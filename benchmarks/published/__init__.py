"""Published rules against ours: `python -m bitknap.benchmarks.published`."""
