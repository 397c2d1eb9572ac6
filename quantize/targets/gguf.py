"""Target `gguf`: a file that llama.cpp loads."""

from __future__ import annotations

from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule


class Gguf(GridTarget):
    """llama.cpp: Q8_0, Q4_0 and their like have blocks of 32; K-quants and IQ types of 256."""

    name = "gguf"
    about = "llama.cpp: GGUF with K-quants and blocks of 32."
    profile = "layer_proj"
    rule = ShapeRule(
        bits=(1, 2, 3, 4, 5, 6, 8),
        groups=(32,),
        cols=32,
        full_cols=256,
        fallback="K-quants and IQ types, which are all below 4 bits, fall back to blocks of 32",
        fallback_bits=(4, 5, 8),
    )
