"""Published rules against Bitknap's plans: `python -m bitknap.benchmarks.published`."""
