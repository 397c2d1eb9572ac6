"""Half-quadratic quantization: fit each group's grid to most of its weights, not to the outliers.

Badri & Shaji (2023) minimise the p-norm of the rounding error, p = 0.7, which forgives a few large
errors, over the zero z of x ≈ s (q - z). An auxiliary error e splits the problem in two that have
closed forms:

    min over z, e of  ‖e‖_p^p + β/2 ‖r - e‖²,  r = x - s (q - z)
    e ← sign(r) max(0, |r| - |r|^(p-1) / β)    generalised soft threshold
    z ← mean(q - (x - e) / s)

The scale stays that of the starting grid, as published. A symmetric grid has no zero to move: there
s is fitted, by least squares of x - e on the codes; and where compact metadata keeps integer zeros,
z takes the whole number nearest to the mean above, then s is fitted to it.

Errors are measured in steps, so that β means the same for every group. At β = 1 the threshold
leaves all errors within a step alone: only weights that the grid clips are forgiven. The published
code takes 10 for errors of raw weights, which at their size forgives even less. Forgiving more
lowers the p-norm further but costs accuracy: on reference:mixtral at int2-g64-asym with s fitted
too, β = 1, 2 and 10 raised the KL of `rtn` by 3, 22 and 59 %.

The start is `rtn`'s grid. A group stops at the first iteration that does not lower its
‖x - x̂‖_p^p; a row takes its result if that norm, on the grid as it is stored, is below the
start's, and the start otherwise. The inputs are not known, so this does not bound the squared
error, which `rtn` minimises.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, and its
code. Equation numbers are not given: the article's text was not at hand in full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.quantization.rounding import rtn
from bitknap.quantization.rounding.grid import LEAST_SCALE, Grid, Quantized
from bitknap.quantization.rounding.grid_lines import lines

# β of the first iteration, its growth, and the most iterations; the last two are the paper's.
_SHARPNESS, _GROWTH, _ITERATIONS = 1.0, 1.01, 20
# Weights worked on at a time: on a CPU temporaries stay in the cache.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 26}


def quantize(weight: Tensor, format: Format, *, power: float) -> Quantized:
    """Quantize each row of `weight` [rows, cols] on its own; experts may be stacked.

    Args:
        weight: what to round.
        format: a grid.
        power: p of the norm, above 0 and at most 1.
    """
    size = _CHUNK.get(weight.device.type, _CHUNK["cuda"]) // weight.shape[1]
    parts = [_rounded(block.float(), format, power) for block in weight.split(max(1, size))]
    return Quantized.stack(parts)


def _rounded(x: Tensor, format: Format, power: float) -> Quantized:
    """Quantize some rows; for each row keep the better of the start and the result."""
    start = rtn.quantize(x, format)
    step, floor = lines(start.grid)
    zero = -floor / step
    fitted = _fit_rows(x, step, zero, start.grid.size, format, power)
    refined = Grid.stored(format, x.shape[1], *fitted)
    better = _norm(x - refined.values(refined.codes(x)), power) < _norm(
        x - start.dequantize(), power
    )
    if not bool(better.any()):
        return start
    chosen = [torch.where(better, a, b) for a, b in zip(fitted, (step, zero), strict=True)]
    grid = Grid.stored(format, x.shape[1], *chosen)
    return Quantized(grid=grid, codes=grid.codes(x))


def _norm(error: Tensor, power: float) -> Tensor:
    """Return ‖error‖_p^p of each row, [rows, 1]."""
    return error.abs().pow_(power).sum(1, keepdim=True)


def _fit_rows(
    x: Tensor, step: Tensor, zero: Tensor, size: int, format: Format, power: float
) -> tuple[Tensor, Tensor]:
    """Return better steps and zeros [rows, G] of rows x; a short last group is fitted by itself."""
    rows, cols = x.shape
    many = cols // size
    parts = []
    for groups, last in ((slice(0, many), many * size), (slice(many, None), cols)):
        part = x[:, groups.start * size : last]
        if part.shape[1] == 0:
            continue
        s, z = step[:, groups].reshape(-1, 1), zero[:, groups].reshape(-1, 1)
        fit = _split(part.reshape(len(s), -1), s, z, format, power)
        parts.append([f.view(rows, -1) for f in fit])
    steps, zeros = (torch.cat(fit, dim=1) for fit in zip(*parts, strict=True))
    return steps, zeros


def _split(
    x: Tensor, step: Tensor, zero: Tensor, format: Format, power: float
) -> tuple[Tensor, Tensor]:
    """Return the best step and zero [groups, 1] that half-quadratic splitting finds.

    Args:
        x: weights, [groups, size].
        step: steps to start from, [groups, 1].
        zero: zeros to start from, [groups, 1].
        format: a grid.
        power: p of the norm.
    """
    levels = 2**format.bits - 1
    best_step, best_zero = step.clone(), zero.clone()
    places = torch.arange(len(x), device=x.device)
    unit, least = step, torch.full_like(step, torch.inf)
    sharpness = _SHARPNESS
    for _ in range(_ITERATIONS + 1):
        q = torch.div(x, step).add_(zero).round_().clamp_(0, levels)
        r = torch.sub(q, zero).mul_(-step).add_(x).div_(unit)
        size = r.abs().clamp_min_(1e-12)
        powers = size.log().mul_(power).exp_()  # twice as fast as pow on a CPU
        norm = powers.sum(1, keepdim=True)
        better = (norm < least)[:, 0].nonzero()[:, 0]
        if len(better) == 0:
            break
        best_step[places[better]], best_zero[places[better]] = step[better], zero[better]
        error = size.sub_(powers.div_(size).div_(sharpness)).relu_().copysign_(r).mul_(unit)
        step, zero = _refit(torch.sub(x, error, out=error), q, step, zero, format)
        sharpness *= _GROWTH
        left = (x, unit, step, zero, places, norm)
        x, unit, step, zero, places, least = (
            left if len(better) == len(x) else (part[better] for part in left)
        )
    return best_step, best_zero


def _refit(
    x: Tensor, q: Tensor, step: Tensor, zero: Tensor, format: Format
) -> tuple[Tensor, Tensor]:
    """Return the step and zero [groups, 1] that fit codes `q` best to x, both [groups, size]."""
    if not format.symmetric:
        zero = torch.addcdiv(q, x, step, value=-1).mean(1, keepdim=True)
        if not format.integer_zero:
            return step, zero
        zero = zero.round_().clamp_(0, 2**format.bits - 1)
    q = q - zero
    norm = torch.linalg.vecdot(q, q).clamp_min_(1e-12)
    return torch.linalg.vecdot(x, q).div_(norm).clamp_min_(LEAST_SCALE).unsqueeze(1), zero
