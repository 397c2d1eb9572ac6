"""Round-to-nearest on a group-wise uniform grid, with an MSE-optimal clipping search.

The search tries shrunken ranges of each group, keeps the one with the least squared error, and
polishes it by least squares on the codes found (Lloyd's alternation). `quantized` says what the
grids are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.allocation.format import Format
from bitknap.quantize.quantized import LEAST_SCALE, Grid, Quantized

# Least share of the full range that the search tries, by width: the best range of a Gaussian row
# of 4,096 weights lies 0.1 or more above each (methods.md 8.4 describes the same grids).
_LEAST_RANGE = {2: 0.25, 3: 0.35, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.9}
# How many ranges are tried: above 4 bits clipping hardly matters.
_CANDIDATES = {2: 8, 3: 8, 4: 6, 5: 4, 6: 3, 7: 2, 8: 2}
_POLISH = 2
_LARGEST = 2.0**25  # beyond every value that an fp16 scale and zero can stand for at 8 bits
_CHUNK = 1 << 15  # weights worked on at a time: all temporaries stay in the second-level cache


def quantize(weight: Tensor, format: Format) -> Quantized:
    """Quantize each row of `weight` [rows, cols] on its own; experts may be stacked."""
    weight = weight.float()
    cols = weight.shape[1]
    parts = []
    for block in weight.split(max(1, _CHUNK // cols)):
        clamped = block.clamp(-_LARGEST, _LARGEST)  # sums stay finite
        grid = Grid.stored(format, cols, *fit_groups(clamped, format))
        parts.append(Quantized(grid=grid, codes=grid.codes(clamped)))
    return Quantized.stack(parts)


def fit_groups(block: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return scale and zero of each group of some rows, float32 [rows, groups]: x ≈ s (q - z).

    The last group of a row may be short, and is searched by itself.
    """
    rows, cols = block.shape
    size = min(format.group_size or cols, cols)
    whole = cols - cols % size
    fits = [_fit(block[:, :whole].reshape(-1, size), format)]
    shapes = [(rows, whole // size)]
    if whole < cols:
        fits.append(_fit(block[:, whole:], format))
        shapes.append((rows, 1))
    scale = torch.cat([s.view(n) for (s, _), n in zip(fits, shapes, strict=True)], 1)
    zero = torch.cat([z.view(n) for (_, z), n in zip(fits, shapes, strict=True)], 1)
    return scale, zero


def _fit(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the best scale s and zero z of each group of `x` [groups, size]: x ≈ s (q - z).

    Both are float32 [groups, 1]. z is half the levels for a symmetric grid, an integer for compact
    metadata, and any real number for an fp16 zero.
    """
    levels = 2**format.bits - 1
    real = not format.symmetric and format.metadata == "fp16"
    centre = x.mean(1, keepdim=True) if real else torch.zeros_like(x[:, :1])
    if format.bits == 1:  # least squares in closed form: the sign's side, and the mean distance
        scale = _positive(2 * (x - centre).abs().mean(1, keepdim=True))
        return scale, 0.5 - centre / scale
    low, high = x.amin(1, keepdim=True) - centre, x.amax(1, keepdim=True) - centre
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    codes = torch.empty_like(x)
    least = _LEAST_RANGE[format.bits]
    candidates = _CANDIDATES[format.bits]
    for trial in range(candidates + _POLISH):
        if trial < candidates:
            share = 1 - (1 - least) * trial / (candidates - 1)
            s, z = _range_grid(centre + low * share, centre + high * share, format)
        else:
            s, z = _least_squares(x, _round(x, scale, zero, levels, codes), zero, real)
        error = _round(x, s, z, levels, codes).sub_(z).mul_(s).sub_(x).square_().sum(1, True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
        zero = torch.where(better, z, zero)
    return scale, zero


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(LEAST_SCALE)


def _round(x: Tensor, scale: Tensor, zero: Tensor, levels: int, out: Tensor) -> Tensor:
    return torch.div(x, scale, out=out).add_(zero).round_().clamp_(0, levels)


def _range_grid(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the grid that spans low .. high, as far as the format can."""
    levels = 2**format.bits - 1
    if format.symmetric:
        return _positive(torch.maximum(-low, high) * (2 / levels)), torch.full_like(low, levels / 2)
    if format.compact:  # an integer zero among the codes needs 0 inside the range
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _positive((high - low) / levels)
    zero = -low / scale
    return scale, zero.round().clamp_(0, levels) if format.compact else zero


def _least_squares(x: Tensor, q: Tensor, zero: Tensor, real: bool) -> tuple[Tensor, Tensor]:
    """Return the scale (and the zero, where it is real) that fit codes `q` best."""
    centre = q.mean(1, keepdim=True) if real else zero
    centred = q - centre
    mean = x.mean(1, keepdim=True)
    norm = centred.square().sum(1, keepdim=True).clamp_min(1e-12)
    scale = _positive(((x - mean if real else x) * centred).sum(1, keepdim=True) / norm)
    return scale, centre - mean / scale if real else zero
