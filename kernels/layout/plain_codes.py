"""How codes lie in memory: the plain layout, a dense stream of bits.

Value i of a matrix occupies bits i*b .. i*b + b - 1 of the stream, low bits first, row after row;
only the last byte is padded. Eight values fill exactly b bytes, which both directions use: eight
values, one byte each, form one 64-bit word, and three steps join pairs, pairs of pairs, and halves.
No Triton here: `quantize` shares this file.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# For each step: (bits between the fields that are joined, mask of the lower ones).
_STEPS = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
# Integer types that hold all the codes of a byte, one byte each.
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
_CHUNK = 1 << 18  # values worked on at a time: temporaries stay in the second-level cache


def packed_bytes(values: int, bits: int) -> int:
    """Return the size in bytes of `values` codes of `bits` bits."""
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
            # word >> gap brings in the sign, which the mask removes.
            word = (word & lower) | ((word >> gap) & lower) << (bits << at)
        stream.copy_(word.view(torch.uint8).view(-1, 8)[:, :bits])
    return out.view(-1)[: packed_bytes(values, bits)]


def unpack_bits(stream: Tensor, bits: int, values: int) -> Tensor:
    """Undo `pack_bits`: return uint8 [values]."""
    if bits == 8:
        return stream[:values].clone()
    eights = -(-values // 8)
    if len(stream) != eights * bits:
        stream = torch.nn.functional.pad(stream, (0, eights * bits - len(stream)))
    stream = stream.contiguous()
    out = torch.empty(8 * eights, dtype=torch.uint8, device=stream.device)
    chunk = _CHUNK if stream.device.type == "cpu" else max(8, len(out))
    for part, codes in zip(stream.split(chunk // 8 * bits), out.split(chunk), strict=True):
        _spread(part, codes, bits)
    return out[:values]


def _spread(stream: Tensor, codes: Tensor, bits: int) -> None:
    """Write codes, one byte each, from groups of eight packed in `bits` bytes."""
    if bits in _WORDS:
        # The codes of one byte begin at the bottom of a word that has a byte for each of them.
        word = codes.view(_WORDS[bits])
        word.copy_(stream)
    else:
        word = codes.view(torch.int64)
        _spread_eights(stream, word, bits)
    other = torch.empty_like(word)
    steps = _STEPS[: word.itemsize.bit_length() - 1]
    for at, (gap, _) in reversed(list(enumerate(steps))):
        width = bits << at
        if 2 * width <= gap:  # the shifted remains of the lower field fall outside the mask
            torch.bitwise_left_shift(word, gap - width, out=other)
            word.bitwise_or_(other).bitwise_and_(_fields(width, gap, word.itemsize))
        else:
            lower = _fields(width, 2 * gap, word.itemsize)
            torch.bitwise_right_shift(word, width, out=other)
            other.bitwise_and_(lower).bitwise_left_shift_(gap)
            word.bitwise_and_(lower).bitwise_or_(other)


def _spread_eights(stream: Tensor, words: Tensor, bits: int) -> None:
    """Put every `bits` bytes at the bottom of a separate word, int64."""
    if stream.device.type == "cpu":
        # NumPy copies words from any address; excess bits are masked out. The last few words would
        # read past the end.
        safe = max(0, len(words) - 8 // bits - 1)
        every = np.ndarray(safe, np.int64, stream.numpy(), strides=(bits,))
        np.copyto(words[:safe].numpy(), every)
        words[:safe].bitwise_and_((1 << (8 * bits)) - 1)
        stream, words = stream[safe * bits :], words[safe:]
    words.zero_()
    words.view(torch.uint8).view(-1, 8)[:, :bits] = stream.view(-1, bits)


def _fields(width: int, gap: int, size: int) -> int:
    """Return `width` bits at the bottom of every `gap` bits of a word of `size` bytes, signed."""
    mask = sum(((1 << width) - 1) << at for at in range(0, 8 * size, gap))
    return mask - (1 << (8 * size)) if mask >> (8 * size - 1) else mask
