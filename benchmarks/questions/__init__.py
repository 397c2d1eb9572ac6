"""Single questions, a module each: `python -m bitknap.benchmarks.questions.uniform` and others."""
