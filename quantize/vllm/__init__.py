"""Packed checkpoints in vLLM: a plug-in that it finds once Bitknap is installed beside it."""
