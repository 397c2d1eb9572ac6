"""Target `gptqmodel`: settings with which GPTQModel quantizes the model as a plan says."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class GptqModel(GridTarget):
    """GPTQModel, which packs 32 codes along the input, and zeros along the output, in words."""

    name = "gptqmodel"
    about = "GPTQModel: settings for GPTQ, each matrix its own."
    profile = "gate_eq_up"
    rule = ShapeRule(bits=(2, 3, 4, 8), groups=(32, 64, 128), rows=32, cols=32)
    symmetric = (True,)
    reads_weights = False
