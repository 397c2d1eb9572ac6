"""Costs scaled to the measured KL of groups of units, and checks of the result."""
