"""Find the experts, in a live model or from safetensors headers alone."""
