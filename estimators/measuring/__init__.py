"""Texts as windows of tokens, and measurements of a model on them: KL, losses, layer outputs."""
