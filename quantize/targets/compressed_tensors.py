"""Target `compressed-tensors`: a folder in the format pack-quantized, for vLLM and transformers.

Weights are symmetric grids with a code for zero and an fp16 scale a group. All experts of a layer
have one format; transformers keeps one for the whole model alone.
"""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class CompressedTensors(GridTarget):
    """compressed-tensors in the format pack-quantized."""

    name = "compressed-tensors"
    about = "compressed-tensors, packed: what vLLM reads, one format a layer."
    profile = "layer"
    rule = ShapeRule(bits=tuple(range(2, 9)), groups=(32, 64, 128, 256), cols=32)
    symmetric = (True,)
    rounding = "midtread"

    def export(self, job: ExportJob) -> Exported:
        """Write the folder: weights, configuration, tokenizer and plan."""
        from bitknap.quantization.targets.folders import compressed_folder

        return compressed_folder.write(job)
