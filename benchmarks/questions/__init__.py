"""Single questions, one per module: `python -m bitknap.benchmarks.questions.uniform` and others."""
