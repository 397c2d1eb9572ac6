"""Target `mlx`: a folder that mlx-lm loads.

MLX's affine grid is x = scale · q + bias with 16-bit scales and biases: the asymmetric grid with
fp16 metadata. So weights may be rounded by any method, and are stored without a change. All experts
of a projection are one module with one format.
"""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class Mlx(GridTarget):
    """MLX, by mlx-lm.

    Its kernels compute garbage without an error for 7 bits and for other groups than these.
    """

    name = "mlx"
    about = "MLX, Apple's array framework, by mlx-lm: one format a layer and projection."
    profile = "layer_proj"
    rule = ShapeRule(bits=(2, 3, 4, 5, 6, 8), groups=(32, 64, 128), cols=32)
    symmetric = (False,)

    def export(self, job: ExportJob) -> Exported:
        """Write the folder: weights, configuration, tokenizer and plan."""
        from bitknap.quantization.targets import mlx_folder

        return mlx_folder.write(job)
