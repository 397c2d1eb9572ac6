"""One unit's bytes: codes, then scales, then zeros, with nothing in between.

    codes   dense bit stream of rows × cols codes (kernels/layout)
    scale   fp16, one a group; or one a row when metadata is compact
    share   dense bit stream of 8 or 6 bits, one a group: compact metadata with more than one
            group a row
    zero    fp16, one a group; or a dense bit stream of b-bit integers when compact

A unit that keeps its source precision is stored as its matrix, unchanged. A unit whose scales fp16
cannot hold has an exponent in the signs of five scales (`kernels.layout.exponents`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.errors import FileError
from bitknap.kernels.layout.exponents import split_exponent, with_exponent
from bitknap.kernels.layout.plain_codes import pack_bits, packed_bytes, unpack_bits
from bitknap.quantization.rounding.grid import Grid, Quantized


def encode(unit: Quantized) -> Tensor:
    """Return the unit's bytes, uint8 [format.nbytes(rows, cols)].

    Raises:
        InputError: the unit has an exponent, and too few rows to hold it.
    """
    grid, bits = unit.grid, unit.format.bits
    scale = with_exponent(grid.scale, grid.only_exponent())
    parts = [pack_bits(unit.codes, bits), _raw(scale)]
    if grid.share is not None:
        parts.append(pack_bits(grid.share, unit.format.share_bits))
    if grid.zero is not None:
        integer = grid.zero.dtype == torch.uint8
        parts.append(pack_bits(grid.zero, bits) if integer else _raw(grid.zero))
    return torch.cat(parts)


def decode(stream: Tensor, format: Format, rows: int, cols: int) -> Quantized:
    """Undo `encode`.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    codes, grid = open_unit(stream, format, rows, cols)
    return Quantized(grid=grid, codes=unpack_bits(codes, format.bits, rows * cols).view(rows, cols))


def open_unit(stream: Tensor, format: Format, rows: int, cols: int) -> tuple[Tensor, Grid]:
    """Return the bytes of a unit's codes, a view of the stream, and its grid.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    needed = int(format.nbytes(rows, cols))
    if len(stream) != needed:
        raise FileError(
            f"packed unit {rows}x{cols} {format.name}: {len(stream)} bytes, not {needed}"
        )
    first = packed_bytes(rows * cols, format.bits)
    cut = _Cutter(stream[first:])
    groups = int(format.groups(cols))
    across = 1 if format.compact else groups
    scale = cut.take(rows * across * 2).view(torch.float16).view(rows, across)
    share = zero = None
    if format.compact and groups > 1:
        share = cut.codes(rows, groups, format.share_bits)
    if not format.symmetric and format.compact:
        zero = cut.codes(rows, groups, format.bits)
    elif not format.symmetric:
        zero = cut.take(rows * groups * 2).view(torch.float16).view(rows, groups)
    scale, exponent = split_exponent(scale)
    grid = Grid(format=format, cols=cols, scale=scale, share=share, zero=zero)
    return stream[:first], grid.with_exponent(exponent)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1)


class _Cutter:
    """Takes consecutive pieces off a stream, each copied so that wider types are aligned."""

    def __init__(self, stream: Tensor) -> None:
        self._stream, self._at = stream, 0

    def take(self, count: int) -> Tensor:
        self._at += count
        return self._stream[self._at - count : self._at].clone()

    def codes(self, rows: int, cols: int, bits: int) -> Tensor:
        packed = self.take(packed_bytes(rows * cols, bits))
        return unpack_bits(packed, bits, rows * cols).view(rows, cols)
