"""Settings with which other tools quantize a model as a plan says, matched against every module."""
