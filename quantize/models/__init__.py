"""Where the experts are, in a live model and in safetensors headers alone."""
