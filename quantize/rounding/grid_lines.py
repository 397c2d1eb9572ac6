"""Any stored grid as one line per group: x ≈ step q + floor, however its zeros are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.quantization.rounding.grid import Grid


def lines(grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the step of each group and the value of its code 0, both float32 [rows, G].

    Args:
        grid: grid of a matrix of ordinary magnitude, without an exponent.
    """
    rows = grid.scale.shape[0]
    zeros = torch.zeros(rows, grid.cols, dtype=torch.uint8, device=grid.scale.device)
    floor = grid.values(zeros)[:, :: grid.size]
    return grid.steps().expand_as(floor), floor
