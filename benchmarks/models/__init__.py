"""Shapes of published models, and checkpoints of random weights with these shapes."""
