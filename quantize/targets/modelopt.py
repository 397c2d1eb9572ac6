"""Target `modelopt`: settings with which NVIDIA ModelOpt quantizes the model as a plan says."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class ModelOpt(GridTarget):
    """ModelOpt: W4A16 has groups of 128, NVFP4 blocks of 16; FP8 and INT8 have a scale a row."""

    name = "modelopt"
    about = "NVIDIA ModelOpt: W4A16, NVFP4, FP8 and INT8."
    profile = "layer"
    rule = ShapeRule(
        bits=(4, 8),
        groups=(128,),
        cols=16,
        full_cols=128,
        fallback="no W4A16, whose groups are 128; NVFP4 and 8 bits remain",
        fallback_bits=(4, 8),
    )
    symmetric = (True,)
    reads_weights = False
