"""GPTQ: round columns one by one; later ones make up for the errors of earlier ones.

With H = E x xᵀ the error of a matrix's output is tr(ΔW H ΔWᵀ), ΔW = W - Ŵ (Frantar et al. 2023,
eq. 1). Let H = R Rᵀ, R upper triangular. Then the error is ‖ΔW R‖², whose column j,

    Σ_{i<j} Δw_i R_ij + Δw_j R_jj ,

is least when w_j + Σ_{i<j} Δw_i R_ij / R_jj is rounded to nearest. That is GPTQ's update without
the inverse of H, whose Cholesky factor is R⁻¹ (Chee et al. 2023, theorem 6, prove the two equal):
one factorization, which also gives the error of every row.

Grids are `rtn`'s, or wider, and fixed before the first column is rounded, so that columns may be
taken in any order and groups keep their places ("static groups"; no g_idx is stored). Rounding to
nearest is always a candidate: a row that GPTQ makes worse keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.quantization.rounding import rtn
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.grid_lines import lines

# Columns of a block, whose errors reach later blocks in one matrix product, and of a step in it.
_BLOCK, _STEP = 128, 16
# Numbers in the largest temporary array: 64 MiB of them, or 1 GiB where a launch costs more.
_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 28}
# How often damping is raised tenfold before giving up; by then every true H has a factor.
_RAISES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factor:
    """H of k matrices, damped, factored and divided by its mean diagonal.

    Attributes:
        order: columns in the order they are rounded, int64 [k, cols].
        feedback: R_ij / R_jj in that order, float32 [k, cols, cols]; 1 on the diagonal.
        pivot: R_jj², float32 [k, cols, 1].
        damping: term added to the diagonal, float32 [k, 1].
    """

    order: Tensor
    feedback: Tensor
    pivot: Tensor
    damping: Tensor

    def sorted(self, x: Tensor) -> Tensor:
        """Return matrices [k, rows, cols] column by column in order, [k, cols, rows]."""
        return _take(x.mT.contiguous(), self.order)

    def unsorted(self, x: Tensor) -> Tensor:
        """Undo `sorted`."""
        return _take(x, self.order.argsort(dim=1)).mT

    def error(self, missed: Tensor, delta: Tensor) -> Tensor:
        """Return each row's error [k, rows], undamped.

        Args:
            missed: error of each column over R_jj, [k, cols, rows].
            delta: ΔW, [k, cols, rows].
        """
        damped = (missed.square() * self.pivot).sum(1)
        return damped - self.damping * delta.square().sum(1)


def quantize(
    weights: Tensor,
    format: Format,
    moments: Tensor,
    *,
    damping: Tensor,
    act_order: bool,
    wider: float = 1.0,
) -> Quantized:
    """Quantize n matrices [n, rows, cols], each by its own second moments [n, cols, cols].

    Args:
        weights: what to round.
        format: a grid.
        moments: E x xᵀ of each matrix's inputs, in any unit; float32.
        damping: term added to each diagonal, relative to its mean, float32 [n]; raised tenfold
            while the factorization fails.
        act_order: take columns by decreasing diagonal, not from left to right.
        wider: step of the grids relative to the best ones for rounding to nearest.

    Raises:
        InputError: moments have another shape, are not finite, or cannot come from inputs.
    """
    n, rows, cols = weights.shape
    if moments.shape != (n, cols, cols):
        raise InputError(
            f"gptq: second moments {list(moments.shape)} do not fit weights {list(weights.shape)}; "
            f"give [{n}, {cols}, {cols}]"
        )
    size = _CHUNK.get(weights.device.type, _CHUNK["cuda"])
    together = max(1, size // (cols * max(rows, cols)))
    parts = []
    for start in range(0, n, together):
        which = slice(start, start + together)
        some = weights[which]
        known, level = moments[which].to(weights.device), damping[which].to(weights.device)
        factor = _factor(known, level, start, act_order)
        # Rows are split only if one matrix fills a chunk, so that parts stay in row order.
        parts += [
            _rounded(block.float(), format, factor, wider)
            for block in some.split(max(1, size // (cols * len(some))), dim=1)
        ]
    return Quantized.stack(parts)


def _factor(moments: Tensor, damping: Tensor, first: int, act_order: bool) -> _Factor:
    """Factor second moments [k, cols, cols] of matrices first, first + 1, ..."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.double().mean(1).float()
    finite = torch.isfinite(moments.sum((1, 2)))
    if not bool(finite.all()):
        raise InputError(
            f"gptq: second moments of matrix {first + int((~finite).nonzero()[0])} are NaN or "
            "infinite; calibrate again in float32, or use `rounding=Hqq()`"
        )
    order = torch.arange(moments.shape[1], device=moments.device).expand(diagonal.shape)
    if act_order:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    # Columns are reversed here: R is the factor of the reversed H, reversed again.
    back = order.flip(1)
    unit = torch.where(mean > 0, mean, 1).view(-1, 1, 1)
    h = _take(_take(moments, back).mT.contiguous(), back).div_(unit)
    level, added = damping, damping.clone()
    h.diagonal(dim1=1, dim2=2).add_(level[:, None])
    for _ in range(_RAISES + 1):
        lower, failed = torch.linalg.cholesky_ex(h)
        if not bool(failed.any()):
            break
        raised = torch.where(failed > 0, level * 9, 0)
        level = torch.where(failed > 0, level * 10, level)
        h.diagonal(dim1=1, dim2=2).add_(raised[:, None])
        added += raised
    else:
        raise InputError(
            f"gptq: second moments of matrix {first + int(failed.nonzero()[0])} have a negative "
            "eigenvalue, which no inputs can give; calibrate again, or use `rounding=Hqq()`"
        )
    upper = lower.flip(1, 2)
    pivot = upper.diagonal(dim1=1, dim2=2).clone()
    return _Factor(
        order=order,
        feedback=upper.div_(pivot[:, None, :]),
        pivot=pivot.square()[:, :, None],
        damping=added[:, None],
    )


def _rounded(weights: Tensor, format: Format, factor: _Factor, wider: float) -> Quantized:
    """Quantize k matrices float32 [k, rows, cols]; of each row keep the better rounding."""
    rows = weights.flatten(0, 1)
    nearest = rtn.quantize(rows, format)
    grid = nearest.grid if wider == 1 else rtn.wider(rows, format, wider)
    x = factor.sorted(weights)
    plain = factor.sorted(weights - nearest.dequantize().view_as(weights))
    step, floor = (y.view(*weights.shape[:2], -1).mT.contiguous() for y in lines(grid))
    codes, delta, missed = _columns(x, step, floor, grid.size, factor, 2**format.bits - 1)
    # NaN is never less: rows with weights too large to square keep rounding to nearest.
    better = factor.error(missed, delta) < factor.error(_missed(plain, factor), plain)
    mine = better.flatten()
    kept = torch.where(mine[:, None], factor.unsorted(codes).flatten(0, 1), nearest.codes)
    return Quantized(grid=grid.where(mine, nearest.grid), codes=kept)


def _columns(
    x: Tensor, step: Tensor, floor: Tensor, size: int, factor: _Factor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of x [k, cols, rows] in turn.

    Args:
        x: weights in the order they are rounded.
        step: step of each group in storage, [k, G, rows].
        floor: value of its code 0.
        size: columns of a group in storage.
        factor: how errors propagate.
        levels: the largest code.

    Returns:
        Codes, uint8; ΔW; and the error of each column over R_jj; all [k, cols, rows].
    """
    cols, weigh = x.shape[1], factor.feedback
    codes = torch.empty_like(x, dtype=torch.uint8)
    delta, missed = torch.empty_like(x), torch.empty_like(x)
    group = factor.order // size
    matrix = torch.arange(len(x), device=x.device)[:, None]
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        goal = missed[:, start:stop].copy_(x[:, start:stop])
        if start:
            goal.baddbmm_(weigh[:, :start, start:stop].mT, delta[:, :start])
        for first in range(start, stop, _STEP):
            last = min(first + _STEP, stop)
            some = missed[:, first:last]
            if first > start:
                some.baddbmm_(weigh[:, start:first, first:last].mT, delta[:, start:first])
            s, low = step, floor
            if step.shape[1] > 1:
                s, low = (part[matrix, group[:, first:last]] for part in (step, floor))
            for j in range(first, last):
                here = slice(j, j + 1)
                at = slice(j - first, j - first + 1) if step.shape[1] > 1 else slice(0, 1)
                wanted = missed[:, here]
                if j > first:
                    wanted.baddbmm_(weigh[:, first:j, here].mT, delta[:, first:j])
                q = torch.sub(wanted, low[:, at]).div_(s[:, at]).round_().clamp_(0, levels)
                codes[:, here] = q
                value = q.mul_(s[:, at]).add_(low[:, at])
                torch.sub(x[:, here], value, out=delta[:, here])
                wanted.sub_(value)
    return codes, delta, missed


def _missed(delta: Tensor, factor: _Factor) -> Tensor:
    """Return the error of each column over R_jj for any ΔW [k, cols, rows]."""
    missed = torch.empty_like(delta)
    for start in range(0, delta.shape[1], _BLOCK):
        stop = start + _BLOCK
        weigh = factor.feedback[:, :stop, start:stop].mT
        torch.bmm(weigh, delta[:, :stop], out=missed[:, start:stop])
    return missed


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Return rows of k matrices [k, m, ...] at `places`, int64 [k, m]; whole rows are copied."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (places + first).flatten()).view_as(x)
