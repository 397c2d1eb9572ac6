"""Round-to-nearest on a group-wise uniform grid, with an MSE-optimal clipping search.

A group of weights x becomes codes q and, by format:

    symmetric            x ≈ s (q - (2^b - 1) / 2)  mid-rise grid; 1 bit is sign × scale
    asymmetric, fp16     x ≈ s q + m    m: fp16 value of code 0; 1 bit is sign × scale + mean
    asymmetric, compact  x ≈ s (q - z)  z: integer zero of b bits

`compact` stores s as an 8-bit share of one fp16 scale a row. The search tries shrunken ranges of
each group, keeps the one with the least squared error, and polishes it by least squares on the
codes found (Lloyd's alternation). Codes are found again after scales were rounded for storage,
so that the error charged is the error deployed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitknap.allocation.format import Format

# Least share of the full range that the search tries, by width: the best range of a Gaussian row
# of 4,096 weights lies 0.1 or more above each (methods.md 8.4 describes the same grids).
_LEAST_RANGE = {2: 0.25, 3: 0.35, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.9}
# How many ranges are tried: above 4 bits clipping hardly matters.
_CANDIDATES = {2: 8, 3: 8, 4: 6, 5: 4, 6: 3, 7: 2, 8: 2}
_POLISH = 2
_LEAST_SCALE = 2.0**-24  # the smallest positive fp16
_LARGEST = 2.0**25  # beyond every value that an fp16 scale and zero can stand for at 8 bits
_CHUNK = 1 << 15  # weights worked on at a time: all temporaries stay in the second-level cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """The codes of a stack of rows and what is needed to read them back.

    Attributes:
        format: the storage format.
        codes: uint8 [rows, cols].
        scale: fp16 [rows, groups] ("fp16" metadata) or fp16 [rows, 1], the row scale ("compact").
        share: uint8 [rows, groups], group scale over row scale in 255ths; None unless compact with
            more than one group a row.
        zero: fp16 [rows, groups] value of code 0, or uint8 [rows, groups] integer zero; None when
            symmetric.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    share: Tensor | None
    zero: Tensor | None

    def dequantize(self) -> Tensor:
        """Return the weights that the codes stand for, float32 [rows, cols]."""
        scale = self.scale.float()
        if self.share is not None:
            scale = scale * (self.share.float() / 255)
        size = self.format.group_size or self.codes.shape[1]
        x = self.codes.float()
        for at, group in enumerate(x.split(size, dim=1)):  # views: x is changed in place
            s = scale[:, at : at + 1]
            if self.zero is None:
                group.sub_((2**self.format.bits - 1) / 2).mul_(s)
            elif self.zero.dtype == torch.uint8:
                group.sub_(self.zero[:, at : at + 1].float()).mul_(s)
            else:
                group.mul_(s).add_(self.zero[:, at : at + 1].float())
        return x

    def rows(self, start: int, stop: int) -> Quantized:
        """Return the part that holds rows start .. stop - 1."""
        return Quantized(
            format=self.format,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            share=None if self.share is None else self.share[start:stop],
            zero=None if self.zero is None else self.zero[start:stop],
        )


def quantize(weight: Tensor, format: Format) -> Quantized:
    """Quantize each row of `weight` [rows, cols] on its own; experts may be stacked."""
    weight = weight.float()
    cols = weight.shape[1]
    size = min(format.group_size or cols, cols)
    parts = [
        _quantize_groups(block.clamp(-_LARGEST, _LARGEST), format, size)  # sums stay finite
        for block in weight.split(max(1, _CHUNK // cols))
    ]
    codes, scale, share, zero = zip(*parts, strict=True)
    return Quantized(
        format=format,
        codes=torch.cat(codes),
        scale=torch.cat(scale),
        share=None if share[0] is None else torch.cat(share),
        zero=None if zero[0] is None else torch.cat(zero),
    )


_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _quantize_groups(block: Tensor, format: Format, size: int) -> _Parts:
    """Quantize some rows; the last group of a row may be short, and is searched by itself."""
    rows, cols = block.shape
    whole = cols - cols % size
    fits = [_fit(block[:, :whole].reshape(-1, size), format)]
    shapes = [(rows, whole // size)]
    if whole < cols:
        fits.append(_fit(block[:, whole:], format))
        shapes.append((rows, 1))
    scale = torch.cat([s.view(n) for (s, _), n in zip(fits, shapes, strict=True)], 1)
    zero = torch.cat([z.view(n) for (_, z), n in zip(fits, shapes, strict=True)], 1)
    return _store(block, format, size, scale, zero)


def _store(x: Tensor, format: Format, size: int, scale: Tensor, zero: Tensor) -> _Parts:
    """Round scales and zeros as they are stored, then find the codes that fit them best."""
    top = torch.finfo(torch.float16).max
    share = None
    if format.metadata == "compact":
        stored = scale.amax(1, keepdim=True).clamp(_LEAST_SCALE, top).half()
        used = stored.float().expand_as(scale)
        if scale.shape[1] > 1:
            share = (scale / used * 255).round_().clamp_(1, 255).to(torch.uint8)
            used = used * (share.float() / 255)
    else:
        stored = scale.clamp(_LEAST_SCALE, top).half()
        used = stored.float()
    kept: Tensor | None = None
    if not format.symmetric:
        integer = format.metadata == "compact"
        kept = zero.to(torch.uint8) if integer else (-scale * zero).clamp(-top, top).half()
    levels = 2**format.bits - 1
    codes = torch.empty_like(x)
    for at, group in enumerate(codes.split(size, dim=1)):
        s = used[:, at : at + 1]
        torch.div(x[:, at * size : at * size + group.shape[1]], s, out=group)
        if kept is None:
            group.add_(levels / 2)
        elif kept.dtype == torch.uint8:
            group.add_(kept[:, at : at + 1].float())
        else:
            group.sub_(kept[:, at : at + 1].float() / s)
        group.round_().clamp_(0, levels)
    return codes.to(torch.uint8), stored, share, kept


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
    return scale.clamp_min(_LEAST_SCALE)


def _round(x: Tensor, scale: Tensor, zero: Tensor, levels: int, out: Tensor) -> Tensor:
    return torch.div(x, scale, out=out).add_(zero).round_().clamp_(0, levels)


def _range_grid(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the grid that spans low .. high, as far as the format can."""
    levels = 2**format.bits - 1
    if format.symmetric:
        return _positive(torch.maximum(-low, high) * (2 / levels)), torch.full_like(low, levels / 2)
    if format.metadata == "compact":  # an integer zero among the codes needs 0 inside the range
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _positive((high - low) / levels)
    zero = -low / scale
    return scale, zero.round().clamp_(0, levels) if format.metadata == "compact" else zero


def _least_squares(x: Tensor, q: Tensor, zero: Tensor, real: bool) -> tuple[Tensor, Tensor]:
    """Return the scale (and the zero, where it is real) that fit codes `q` best."""
    centre = q.mean(1, keepdim=True) if real else zero
    centred = q - centre
    mean = x.mean(1, keepdim=True)
    norm = centred.square().sum(1, keepdim=True).clamp_min(1e-12)
    scale = _positive(((x - mean if real else x) * centred).sum(1, keepdim=True) / norm)
    return scale, centre - mean / scale if real else zero
