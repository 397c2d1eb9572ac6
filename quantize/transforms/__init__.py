"""Models rewritten before they are quantized: sorted neurons, a rotated residual stream."""
