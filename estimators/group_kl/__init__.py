"""Costs scaled by measured KL of groups of units, and the checks of that."""
