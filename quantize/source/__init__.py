"""Reading a model on disk or on the hub: headers, tensors, low-precision codes."""
