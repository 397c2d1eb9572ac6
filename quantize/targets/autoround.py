"""Target `autoround`: settings with which AutoRound quantizes the model as a plan says."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class AutoRound(GridTarget):
    """AutoRound, whose checkpoints are GPTQ codes in 32-bit words."""

    name = "autoround"
    about = "AutoRound: settings for signed rounding, one format a layer."
    profile = "layer"
    rule = ShapeRule(bits=(2, 3, 4, 8), groups=(32, 64, 128), rows=32, cols=32)
    symmetric = (True,)
    reads_weights = False
