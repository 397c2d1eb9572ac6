"""Calibration passes over a text: whole model in memory, or one decoder layer at a time."""
