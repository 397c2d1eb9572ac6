"""Target `mlx`: a folder that mlx-lm loads."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class Mlx(GridTarget):
    """MLX, by mlx-lm."""

    name = "mlx"
    about = "MLX: Apple's array framework, one format a layer and projection."
    profile = "layer_proj"
    rule = ShapeRule(bits=(2, 3, 4, 5, 6, 8), groups=(32, 64, 128), cols=32)
    symmetric = (False,)
