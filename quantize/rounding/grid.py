"""The result of rounding a matrix: codes, and the grid of each group that decodes them.

A group of weights x becomes codes q and, by format:

    symmetric            x ≈ s (q - (2^b - 1) / 2)  mid-rise grid; 1 bit is sign × scale
    asymmetric, fp16     x ≈ s q + m    m: fp16 value of code 0; 1 bit is sign × scale + mean
    asymmetric, compact  x ≈ s (q - z)  z: integer zero of b bits
    symmetric, gptq      x ≈ s (q - 2^(b-1))  one step more below zero than above
    asymmetric, gptq     x ≈ s (q - z)  z: integer zero of b bits

`compact` stores s as an 8-bit share of one fp16 scale a row, `compact6` as a 6-bit one. Every
rounding method uses these grids: scales and zeros are rounded to their stored precision before
codes are chosen, so that costs are charged for the error that is deployed. A matrix whose scales
fp16 cannot hold also has a power of two that multiplies everything above (`magnitude`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.kernels.layout.exponents import power, times_power

LEAST_SCALE = 2.0**-24  # the smallest positive fp16


def top_share(format: Format) -> int:
    """Return the share that stands for the whole row scale."""
    most: int = 2**format.share_bits - 1
    return most


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The stored scales and zeros of rows; G groups a row.

    Attributes:
        format: the storage format.
        cols: weights in a row.
        scale: fp16 [rows, G] ("fp16" metadata) or fp16 [rows, 1], the row scale ("compact").
        share: uint8 [rows, G], group scale over row scale in 255ths, or 63rds (`top_share`); None
            unless compact with more than one group a row.
        zero: fp16 [rows, G] value of code 0, or uint8 [rows, G] integer zero; None when symmetric.
        exponent: exponent of the power of two that multiplies each row's weights, int32 [rows, 1],
            the same in all rows of a matrix; None for 0 in every row.
    """

    format: Format
    cols: int
    scale: Tensor
    share: Tensor | None
    zero: Tensor | None
    exponent: Tensor | None = None

    @classmethod
    def stored(cls, format: Format, cols: int, scale: Tensor, zero: Tensor) -> Grid:
        """Return the grid with scales and zeros rounded to their stored precision.

        Args:
            format: a grid.
            cols: weights of a row.
            scale: step s of each group, above 0, float32 [rows, G].
            zero: real or integer code that stands for 0, float32 [rows, G]: x ≈ s (q - zero);
                not read when symmetric.
        """
        top = torch.finfo(torch.float16).max
        share = kept = None
        if format.compact:
            row = scale.amax(1, keepdim=True).clamp(LEAST_SCALE, top).half()
            if scale.shape[1] > 1:
                most = top_share(format)
                share = (scale / row.float() * most).round_().clamp_(1, most).to(torch.uint8)
        else:
            row = scale.clamp(LEAST_SCALE, top).half()
        if not format.symmetric and format.integer_zero:
            kept = zero.round().clamp(0, 2**format.bits - 1).to(torch.uint8)
        elif not format.symmetric:
            kept = (-scale * zero).clamp(-top, top).half()
        return cls(format=format, cols=cols, scale=row, share=share, zero=kept)

    @property
    def size(self) -> int:
        """Number of weights in a full group."""
        return self.format.group_size or self.cols

    def steps(self) -> Tensor:
        """Return s of every group before `exponent`, float32 [rows, G or 1]."""
        scale = self.scale.float()
        if self.share is None:
            return scale
        return scale * (self.share.float() / top_share(self.format))

    def codes(self, x: Tensor) -> Tensor:
        """Return the nearest codes of `x` float32 [rows, cols], uint8; all groups at once."""
        step, top = self.steps(), 2**self.format.bits - 1
        if self.exponent is not None:
            x = x * power(-self.exponent)
        if self.zero is None:
            zero = torch.full_like(step, self.format.middle)
        else:
            zero = (
                self.zero.float() if self.zero.dtype == torch.uint8 else -self.zero.float() / step
            )
        rows, cols = x.shape
        size = min(self.size, cols)
        many, whole = cols // size, cols - cols % size
        codes = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
        for groups, part in (
            (slice(0, many), slice(0, whole)),
            (slice(many, None), slice(whole, cols)),
        ):
            if part.start < part.stop:
                s, z = step[:, groups, None], zero[:, groups, None]
                q = torch.div(x[:, part].unflatten(1, (s.shape[1], -1)), s).add_(z)
                codes[:, part] = q.round_().clamp_(0, top).flatten(1)
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that `codes` [rows, cols] stand for, float32.

        Args:
            codes: uint8, or float32, which the weights then overwrite.
        """
        steps, x = self.steps(), codes.float()
        whole = self.cols - self.cols % min(self.size, self.cols)
        for part, groups in (
            (x[:, :whole], slice(0, whole // self.size or 1)),
            (x[:, whole:], slice(-1, None)),
        ):
            if part.shape[1]:
                s = steps[:, groups, None]
                part = part.unflatten(1, (s.shape[1], -1))  # a view: x is changed in place
                if self.zero is None:
                    part.sub_(self.format.middle).mul_(s)
                elif self.zero.dtype == torch.uint8:
                    part.sub_(self.zero[:, groups, None].float()).mul_(s)
                else:
                    part.mul_(s).add_(self.zero[:, groups, None].float())
        if self.exponent is not None:
            times_power(x, self.exponent)
        return x

    def rows(self, start: int, stop: int) -> Grid:
        """Return the grid of rows start .. stop - 1."""
        return Grid(
            format=self.format,
            cols=self.cols,
            scale=self.scale[start:stop],
            share=None if self.share is None else self.share[start:stop],
            zero=None if self.zero is None else self.zero[start:stop],
            exponent=None if self.exponent is None else self.exponent[start:stop],
        )

    def columns(self, start: int, stop: int) -> Grid:
        """Return the grid of columns start .. stop - 1, which begin and end at borders of groups.

        A row's scale stays what it was, so shares do too, also where one group is left.
        """
        groups = slice(start // self.size, -(-stop // self.size))

        def part(column: Tensor | None) -> Tensor | None:
            return column if column is None or column.shape[1] == 1 else column[:, groups]

        return replace(
            self,
            cols=stop - start,
            scale=self.scale if self.scale.shape[1] == 1 else self.scale[:, groups],
            share=part(self.share),
            zero=part(self.zero),
        )

    def only_exponent(self) -> int:
        """Return the exponent of a grid of one matrix."""
        return 0 if self.exponent is None or not len(self.exponent) else int(self.exponent[0])

    def with_exponent(self, exponent: int) -> Grid:
        """Return this grid of one matrix with an exponent."""
        if not exponent:
            return replace(self, exponent=None)
        column = torch.full_like(self.scale[:, :1], exponent, dtype=torch.int32)
        return replace(self, exponent=column)

    def where(self, rows: Tensor, other: Grid) -> Grid:
        """Return this grid in the rows that are true, bool [rows], and `other` in the rest."""

        def pick(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if ours is None or theirs is None:
                return None
            return torch.where(rows[:, None], ours, theirs)

        return Grid(
            format=self.format,
            cols=self.cols,
            scale=torch.where(rows[:, None], self.scale, other.scale),
            share=pick(self.share, other.share),
            zero=pick(self.zero, other.zero),
            exponent=pick(self.exponent, other.exponent),
        )

    @staticmethod
    def stack(grids: list[Grid]) -> Grid:
        """Return grids of the same format and width as one, with their rows concatenated."""
        first = grids[0]
        return Grid(
            format=first.format,
            cols=first.cols,
            scale=torch.cat([grid.scale for grid in grids]),
            share=_stack([grid.share for grid in grids]),
            zero=_stack([grid.zero for grid in grids]),
            exponent=_stack_exponents(grids),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """The codes of a stack of rows and the grid that decodes them.

    Attributes:
        grid: scales and zeros.
        codes: uint8 [rows, cols].
    """

    grid: Grid
    codes: Tensor

    @property
    def format(self) -> Format:
        """The storage format."""
        return self.grid.format

    @property
    def nbytes(self) -> int:
        """Bytes in memory, a byte a code."""
        parts = (self.codes, self.grid.scale, self.grid.share, self.grid.zero)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantize(self) -> Tensor:
        """Return the weights that the codes stand for, float32 [rows, cols]."""
        return self.grid.values(self.codes)

    def times_power(self, exponent: Tensor | None) -> Quantized:
        """Return this with the weights of each row multiplied by 2^exponent, int32 [rows].

        The grid's own exponent is replaced; None removes it.
        """
        column = None if exponent is None else exponent[:, None]
        return Quantized(grid=replace(self.grid, exponent=column), codes=self.codes)

    def rows(self, start: int, stop: int) -> Quantized:
        """Return the part that holds rows start .. stop - 1."""
        return Quantized(grid=self.grid.rows(start, stop), codes=self.codes[start:stop])

    def columns(self, start: int, stop: int) -> Quantized:
        """Return the part that holds columns start .. stop - 1; both are borders of groups."""
        return Quantized(grid=self.grid.columns(start, stop), codes=self.codes[:, start:stop])

    @staticmethod
    def stack(parts: list[Quantized]) -> Quantized:
        """Return parts of the same format and width as one, with their rows concatenated."""
        return Quantized(
            grid=Grid.stack([part.grid for part in parts]),
            codes=torch.cat([part.codes for part in parts]),
        )


def _stack(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _stack_exponents(grids: list[Grid]) -> Tensor | None:
    if all(grid.exponent is None for grid in grids):
        return None
    none = [torch.zeros_like(grid.scale[:, :1], dtype=torch.int32) for grid in grids]
    exponents = [grid.exponent for grid in grids]
    return torch.cat([n if f is None else f for n, f in zip(none, exponents, strict=True)])
