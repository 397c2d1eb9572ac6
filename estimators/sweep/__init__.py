"""Passing a text through a model and recording: whole in memory, or one decoder layer at a time."""
