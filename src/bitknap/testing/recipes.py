"""For tests of kernels: how the scales and codes of units are stored, one of each kind."""

from bitknap.kernels.layout.scale_words import Recipe

__all__ = ["GRIDS", "KEPT", "WIDTHS"]

KEPT = Recipe(bits=16, group=1, kept=1)
WIDTHS = tuple(Recipe(bits=bits, group=128) for bits in range(1, 9))
GRIDS = (
    Recipe(bits=2, group=32),
    Recipe(bits=3, group=64, share=6),
    Recipe(bits=4, group=256, symmetric=True),
    Recipe(bits=5, group=1 << 20),
    Recipe(bits=8, group=32, share=8),
    Recipe(bits=4, group=32, share=8, symmetric=True),
    KEPT,
)
