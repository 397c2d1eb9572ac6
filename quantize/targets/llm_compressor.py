"""Target `llm-compressor`: a recipe for llm-compressor that quantizes the model as a plan says."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class LlmCompressor(GridTarget):
    """llm-compressor, which writes compressed-tensors."""

    name = "llm-compressor"
    about = "llm-compressor: a recipe for compressed-tensors, one format a layer."
    profile = "layer"
    rule = ShapeRule(bits=tuple(range(2, 9)), groups=(32, 64, 128, 256))
    symmetric = (True,)
    reads_weights = False
