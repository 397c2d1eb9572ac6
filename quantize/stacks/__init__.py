"""Apply a plan to weights, in runs of units that are processed together."""
