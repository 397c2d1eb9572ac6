"""Packed checkpoints as transformers models: loading, packed layers, saving."""
