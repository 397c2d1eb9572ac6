"""Speed and quality of the quantizer: `python -m bitknap.benchmarks.quantize`."""
