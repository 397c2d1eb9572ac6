"""Losses of whole models on a text, of models larger than memory too."""
