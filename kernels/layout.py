"""How codes lie in memory: the plain layout, a dense stream of bits.

Value i of a matrix occupies bits i*b .. i*b + b - 1 of the stream, low bits first, row after row;
nothing is padded but the last byte. Eight values fill exactly b bytes, which is how both
directions work: eight values, a byte each, are one 64-bit word, and three steps bring pairs, pairs
of pairs and halves together. No Triton here: `quantize` shares this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

# (bits between the fields that meet, the lower ones of them) in each step.
_STEPS = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
_CHUNK = 1 << 18  # values worked on at a time: temporaries stay in the second-level cache


def packed_bytes(values: int, bits: int) -> int:
    """Return the bytes that `values` codes of `bits` bits take."""
    return (values * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (any shape, integers below 2**bits) into a dense stream, uint8 [bytes]."""
    flat = codes.reshape(-1).to(torch.uint8)
    values = len(flat)
    if values % 8 or flat.storage_offset() % 8:
        aligned = torch.zeros(-(-values // 8) * 8, dtype=torch.uint8, device=flat.device)
        aligned[:values] = flat
        flat = aligned
    out = torch.empty(len(flat) // 8, bits, dtype=torch.uint8, device=flat.device)
    for eights, stream in zip(flat.split(_CHUNK), out.split(_CHUNK // 8), strict=True):
        word = eights.view(torch.int64)
        for at, (gap, lower) in enumerate(_STEPS):
            # word >> gap brings in the sign, which the mask takes out again.
            word = (word & lower) | ((word >> gap) & lower) << (bits << at)
        stream.copy_(word.view(torch.uint8).view(-1, 8)[:, :bits])
    return out.view(-1)[: packed_bytes(values, bits)]


def unpack_bits(stream: Tensor, bits: int, values: int) -> Tensor:
    """Undo `pack_bits`: return uint8 [values]."""
    eights = -(-values // 8)
    if len(stream) != eights * bits:
        stream = torch.nn.functional.pad(stream, (0, eights * bits - len(stream)))
    out = torch.empty(eights, 8, dtype=torch.uint8, device=stream.device)
    for part, codes in zip(
        stream.reshape(-1, bits).split(_CHUNK // 8), out.split(_CHUNK // 8), strict=True
    ):
        codes.zero_()
        codes[:, :bits] = part
        word = codes.view(torch.int64).view(-1)
        for at, (gap, _) in reversed(list(enumerate(_STEPS))):
            mask = _fields(bits << at, gap)
            word = (word & mask) | ((word >> (bits << at)) & mask) << gap
        codes.view(torch.int64).view(-1).copy_(word)
    flat: Tensor = out.view(-1)[:values]
    return flat


def _fields(width: int, gap: int) -> int:
    """Return the mask of `width` bits at the bottom of every second run of `gap` bits."""
    return sum(((1 << width) - 1) << at for at in range(0, 64, 2 * gap))
