"""Target `compressed-tensors`: a folder that vLLM and transformers load."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class CompressedTensors(GridTarget):
    """compressed-tensors in the format pack-quantized."""

    name = "compressed-tensors"
    about = "compressed-tensors: what vLLM and llm-compressor read."
    profile = "layer"
    rule = ShapeRule(bits=tuple(range(1, 9)), groups=(32, 64, 128, 256))
    symmetric = (True,)
