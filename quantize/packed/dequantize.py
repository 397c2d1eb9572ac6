"""From one unit's bytes to its weights, a few rows at a time.

Rows are unpacked, scaled and rounded to the wanted dtype while they are in the second-level cache:
on a CPU nothing of a matrix's size is written except the matrix itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.kernels.layout.plain_codes import unpack_bits
from bitknap.kernels.layout.tiled_codes import ROWS, tile_bytes, unpack_tiles
from bitknap.quantization.packed import plain_bytes, tiled_bytes
from bitknap.quantization.source import low_bit_codes

KEPT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CHUNK = 1 << 17  # weights worked on at a time: codes and float32 take 0.6 MB
MOST_HALF = torch.finfo(torch.float16).max
_ALIGNED = 8  # rows that begin at a whole byte, whatever their width


def unpacked(stream: Tensor, format: Format, rows: int, cols: int, layout: str = "plain") -> Tensor:
    """Return the matrix that one unit's bytes stand for, float32 [rows, cols], on their device.

    Args:
        stream: uint8.
        format: how it is stored.
        rows: output features.
        cols: input features.
        layout: byte layout, "plain" (`plain_bytes`) or "tiles" (`tiled_bytes`).

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    out = torch.empty(rows, cols, device=stream.device)
    dequantize_into(out, stream, format, layout)
    return out


def dequantize_into(out: Tensor, stream: Tensor, format: Format, layout: str = "plain") -> None:
    """Write the matrix that one unit's bytes stand for into `out`, rounded to its dtype once.

    Args:
        out: [rows, cols], any floating dtype and strides, on the stream's device.
        stream: uint8.
        format: how it is stored.
        layout: byte layout of the stream.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    rows, cols = out.shape
    if format.kind == "keep":
        with stream.device:
            out.copy_(_kept(stream, format, rows, cols, layout))
        return
    read = tiled_bytes.open_tiles if layout == "tiles" else plain_bytes.open_unit
    codes, grid = read(stream, format, rows, cols)
    step = rows
    if stream.device.type == "cpu":
        least = ROWS if layout == "tiles" else _ALIGNED
        step = max(1, _CHUNK // (cols * least)) * least
    for first in range(0, rows, step):
        last = min(rows, first + step)
        some = _codes(codes, format.bits, first, last, cols, layout)
        values = grid.rows(first, last).values(some)
        if out.dtype == torch.float16:  # rounding may exceed the largest value
            values.clamp_(-MOST_HALF, MOST_HALF)
        out[first:last].copy_(values)


def _codes(stream: Tensor, bits: int, first: int, last: int, cols: int, layout: str) -> Tensor:
    """Return the codes of some rows, float32 [last - first, cols]."""
    if layout == "tiles":
        begin = tile_bytes(first, cols, bits)
        part = stream[begin : begin + tile_bytes(last - first, cols, bits)]
        return unpack_tiles(part.view(torch.int16), bits, last - first, cols, torch.float32)
    begin, count = first * cols * bits // 8, (last - first) * cols
    part = stream[begin : begin - (-count * bits // 8)]
    return unpack_bits(part, bits, count).view(-1, cols).float()


def _kept(stream: Tensor, format: Format, rows: int, cols: int, layout: str) -> Tensor:
    if layout == "tiles":
        stream = tiled_bytes.to_plain(stream, format, rows, cols)
    if format.source in KEPT:
        return stream.clone().view(KEPT[format.source]).view(rows, cols)
    return low_bit_codes.restore(stream, format.source, rows, cols)
