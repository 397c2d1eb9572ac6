"""Round-to-nearest on a group-wise uniform grid, with an MSE-optimal clipping search.

The search tries shrunken ranges of each group. Rounding to a range gives codes, and least squares
gives the grid that fits those codes best. The range whose grid explains most of the group is taken
and refined once more (Lloyd's alternation). `grid` defines the grids.

A matrix is processed in chunks that stay in the cache: a search is about 40 sweeps over each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.quantization.rounding.grid import LEAST_SCALE, Grid, Quantized

# The smallest range that the search tries, by width: a share of the full one, or a number of
# standard deviations to each side if that is more. Best ranges of Gaussian weights lie above both.
_LEAST_RANGE = {2: 0.25, 3: 0.35, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.9}
_LEAST_SPREAD = {2: 1.3, 3: 1.8, 4: 2.3, 5: 2.8, 6: 3.2, 7: 3.6, 8: 4.0}
_MOST = 0.8  # so that few weights near to each other are not all kept at the full range
# How many ranges are tried, and how many more in long groups, whose full range is wider. With a
# real zero, which least squares moves as well, short groups need one less. On Gaussian and
# heavy-tailed weights, one more range was measured to gain less than 1 % of the error.
_CANDIDATES = {2: 5, 3: 5, 4: 5, 5: 4, 6: 3, 7: 2, 8: 2}
_LONG, _MORE = 128, 2
_POLISH = 1
_LARGEST = 2.0**25  # beyond every value that an fp16 scale and zero can stand for at 8 bits
# Weights worked on at a time. On a CPU smaller chunks are slower: many steps work on one number per
# group.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}


def quantize(weight: Tensor, format: Format) -> Quantized:
    """Quantize each row of `weight` [rows, cols] on its own; experts may be stacked."""
    parts = []
    for block in _blocks(weight):
        grid = Grid.stored(format, weight.shape[1], *fit_groups(block, format))
        parts.append(Quantized(grid=grid, codes=grid.codes(block)))
    return Quantized.stack(parts)


def wider(weight: Tensor, format: Format, factor: float) -> Grid:
    """Return the grids of rows [rows, cols], fitted and then stretched about their middle."""
    middle = (2**format.bits - 1) / 2
    fits = [fit_groups(block, format) for block in _blocks(weight)]
    scale, zero = (torch.cat(part) for part in zip(*fits, strict=True))
    stretched = middle - (middle - zero) / factor
    return Grid.stored(format, weight.shape[1], scale * factor, stretched)


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """Yield rows in float32 chunks, clamped so that sums stay finite."""
    size = _CHUNK.get(weight.device.type, _CHUNK["cuda"])
    for block in weight.split(max(1, size // weight.shape[1])):
        yield block.float().clamp(-_LARGEST, _LARGEST)


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

    Both are float32 [groups, 1]. z is the middle of a symmetric grid, an integer where zeros are
    stored as integers, and any real number for an fp16 zero.
    """
    real = not (format.symmetric or format.integer_zero)
    mean = x.mean(1, keepdim=True)
    if real:
        x = x - mean
    if format.bits == 1:  # closed-form least squares: signs, and twice the mean distance as step
        scale = _positive(2 * x.abs().mean(1, keepdim=True))
        return scale, 0.5 - mean / scale if real else torch.full_like(scale, 0.5)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    least = _least_share(x, low, high, format.bits)
    total = None if real else mean * x.shape[1]
    most, scale, zero = torch.full_like(low, -1), low, low
    work = torch.empty_like(x), torch.empty_like(x)
    trials = _trials(format.bits, x.shape[1], real)
    for trial in range(trials):
        share = 1 - (1 - least) * (trial / (trials - 1))
        s, z = _range_grid(low * share, high * share, format)
        s, z, explained = _refit(x, s, z, total, format.bits, work)
        better = explained > most
        most = torch.maximum(explained, most)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    for _ in range(_POLISH):
        scale, zero, _ = _refit(x, scale, zero, total, format.bits, work)
    return scale, zero - mean / scale if real else zero


def _trials(bits: int, size: int, real: bool) -> int:
    """Return how many ranges to try, 2 or more."""
    if size >= _LONG:
        return _CANDIDATES[bits] + _MORE
    return max(2, _CANDIDATES[bits] - real)


def _least_share(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the smallest share of the full range that is tried, [groups, 1]."""
    spread: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True) * x.shape[1] ** -0.5
    reach = torch.maximum(-low, high).clamp_min_(1e-30)
    least = _LEAST_RANGE[bits]
    return spread.mul_(_LEAST_SPREAD[bits]).div_(reach).clamp_(least, max(least, _MOST))


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(LEAST_SCALE)


def _range_grid(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the grid that spans low .. high, as far as the format allows."""
    levels = 2**format.bits - 1
    if format.symmetric:
        middle = format.middle
        reach = torch.maximum(-low, high * (middle / (levels - middle)))
        return _positive(reach * (1 / middle)), torch.full_like(low, middle)
    if format.integer_zero:  # an integer zero among the codes needs 0 inside the range
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _positive((high - low) / levels)
    zero = -low / scale
    return scale, zero.round().clamp_(0, levels) if format.integer_zero else zero


def _refit(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    total: Tensor | None,
    bits: int,
    work: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to a grid; return the scale and zero that fit the codes best, and Σ x² - Σ (x - x̂)².

    Args:
        x: weights, [groups, size]; of mean 0 if the zero may move.
        scale: scales of the grid to round to, [groups, 1].
        zero: zeros of that grid, [groups, 1].
        total: sum of each group; None if the zero may move, to any real number.
        bits: width of a code.
        work: two arrays like x to overwrite.
    """
    half, count = 2 ** (bits - 1), x.shape[1]
    q, product = work  # codes less half, so that squares stay small beside their variance
    torch.mul(x, scale.reciprocal(), out=q).add_(zero - half).round_().clamp_(-half, half - 1)
    first = q.sum(1, keepdim=True)
    both = torch.mul(x, q, out=product).sum(1, keepdim=True)
    square = q.square_().sum(1, keepdim=True)
    if total is None:
        centre = first / count
        zero = centre + half
        square -= centre * first
    else:
        centre = zero - half
        both -= centre * total
        square -= centre * (2 * first - count * centre)
    slope = both / square.clamp_min_(1e-6)
    return _positive(slope), zero, both.mul_(slope)
