"""How codes lie in memory: the plain layout, a dense stream of bits.

Value i of a matrix occupies bits i*b .. i*b + b - 1 of the stream, low bits first, row after row;
nothing is padded but the last byte. Eight values fill exactly b bytes, which is how both
directions work: eight values meet in one 64-bit word. No Triton here: `quantize` shares this file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(values: int, bits: int) -> int:
    """Return the bytes that `values` codes of `bits` bits take."""
    return (values * bits + 7) // 8


def _shifts(bits: int) -> Tensor:
    return torch.arange(8, dtype=torch.int64) * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (any shape, integers below 2**bits) into a dense stream, uint8 [bytes]."""
    flat = codes.reshape(-1)
    words = torch.zeros((len(flat) + 7) // 8, 8, dtype=torch.int64)
    words.view(-1)[: len(flat)] = flat
    stream = (words << _shifts(bits)).sum(1).view(torch.uint8).view(-1, 8)[:, :bits]
    return stream.reshape(-1)[: packed_bytes(len(flat), bits)].contiguous()


def unpack_bits(stream: Tensor, bits: int, values: int) -> Tensor:
    """Undo `pack_bits`: return uint8 [values]."""
    rows = (values + 7) // 8
    padded = torch.zeros(rows * bits, dtype=torch.uint8)
    padded[: len(stream)] = stream
    words = torch.zeros(rows, 8, dtype=torch.uint8)
    words[:, :bits] = padded.view(rows, bits)
    codes = (words.view(torch.int64) >> _shifts(bits)) & (2**bits - 1)
    flat: Tensor = codes.to(torch.uint8).view(-1)[:values]
    return flat
