"""Target `gptq`: a folder of weights in the format of GPTQ, which GPTQModel loads.

A grid is x = scale · (q - z) with an fp16 scale and an integer zero a group; symmetric grids have
their zero in the middle of the codes. Weights may be rounded by any method, GPTQ or not.
"""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class Gptq(GridTarget):
    """GPTQ's format, which packs 32 codes along the input, and zeros along the output, in words."""

    name = "gptq"
    about = "Weights in GPTQ's format, for GPTQModel: each matrix its own."
    profile = "free"
    rule = ShapeRule(bits=(2, 3, 4, 8), groups=(32, 64, 128), rows=32, cols=32)
    metadata = "gptq"

    def export(self, job: ExportJob) -> Exported:
        """Write the folder: weights, configuration, tokenizer and plan."""
        from bitknap.quantization.targets.folders import gptq_folder

        return gptq_folder.write(job)
