"""Rounding to nearest on grids that have a code for zero: x ≈ s (q - 2^(b-1)), one scale a group.

compressed-tensors and GPTQ store symmetric grids so. They have one step more below zero than above;
the symmetric grids of packed checkpoints have none at zero (`grid`).

The search is that of `rtn` for one number: the range of each group is shrunk step by step, codes
are taken, least squares gives the scale that fits them best, and the scale whose codes lose least
is kept, as fp16 stores it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.quantization.rounding.grid import LEAST_SCALE, Grid, Quantized

# Smallest share of a group's range that is tried, by width, and how many shares are.
_LEAST = {2: 0.4, 3: 0.45, 4: 0.55, 5: 0.65, 6: 0.75, 7: 0.85, 8: 0.9}
_CANDIDATES = 9
# Weights worked on at a time.
_CHUNK = 1 << 20


def quantize(weight: Tensor, format: Format) -> Quantized:
    """Quantize each row of `weight` [rows, cols] on its own.

    Raises:
        InputError: the format has a zero point, compact metadata or 1 bit.
    """
    if not format.symmetric or format.compact or format.bits not in _LEAST:
        raise InputError(
            f"midtread: {format} is not a symmetric grid of 2 to 8 bits with fp16 scales; "
            "name symmetric formats, or use `rounding=rtn`"
        )
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = []
    for block in weight.split(rows):
        x = block.float()
        scale = torch.cat([_scales(part, format.bits) for part in _groups(x, format)], dim=1)
        half = 2.0 ** (format.bits - 1)
        # The value of code 0 is a power of two times the scale, which fp16 holds exactly.
        grid = Grid(
            format=format,
            cols=weight.shape[1],
            scale=scale,
            share=None,
            zero=(-half * scale.float()).half(),
        )
        parts.append(Quantized(grid=grid, codes=grid.codes(x)))
    return Quantized.stack(parts)


def _groups(x: Tensor, format: Format) -> list[Tensor]:
    """Return whole groups of rows, [rows, groups, size], and the short last one if there is one."""
    rows, cols = x.shape
    size = min(format.group_size or cols, cols)
    whole = cols - cols % size
    parts = [x[:, :whole].reshape(rows, -1, size), x[:, whole:].reshape(rows, 1, -1)]
    return [part for part in parts if part.shape[2]]


def _scales(x: Tensor, bits: int) -> Tensor:
    """Return the scale of each group of [rows, groups, size], fp16 [rows, groups]."""
    half = 2 ** (bits - 1)
    most = x.abs().amax(2)
    best = torch.full_like(most, torch.inf)
    kept = torch.full_like(most, LEAST_SCALE).half()
    for share in torch.linspace(_LEAST[bits], half / (half - 1), _CANDIDATES).tolist():
        scale = most * (share / half)
        for _ in range(2):  # as the range says, and as least squares fits its codes
            stored = scale.clamp(LEAST_SCALE, torch.finfo(torch.float16).max).half()
            step = stored.float()[..., None]
            codes = (x / step).round_().clamp_(-half, half - 1)
            loss = (codes * step - x).square_().sum(2)
            better = loss < best
            best, kept = torch.where(better, loss, best), torch.where(better, stored, kept)
            scale = (codes * x).sum(2) / codes.square().sum(2).clamp_min(1e-30)
    return kept
