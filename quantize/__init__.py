"""From weights and a plan to a packed checkpoint and back; imported as `bitknap.quantization`."""
