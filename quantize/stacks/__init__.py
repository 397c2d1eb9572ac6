"""A plan meets weights: runs of units that are worked on together."""
