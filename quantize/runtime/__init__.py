"""Packed checkpoints as transformers models: loading, packed layers, saving."""

# transformers' table of methods first: once imported, it imports `transformers_plugin` by our hook,
# and would meet it half imported if it came in from there.
import transformers.quantizers.auto  # noqa: F401
