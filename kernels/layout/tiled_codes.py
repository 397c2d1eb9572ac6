"""How codes lie in memory for kernels: tiles of 64 rows, 16 codes of b bits in b 16-bit words.

A row is cut into blocks of 256 columns and, for the remainder, at most one block each of 128, 64
and 32; the last block is padded with zeros, and rows are padded to a multiple of 64. A block of
16·L columns (L lanes: 16, 8, 4 or 2) is 16 slots of L lanes:

    column = first + L · slot + lane

The 16 slots of one row and lane take exactly b 16-bit words at every b. Each word holds
floor(16 / b) slots in its low bits, first slot lowest; the spare bits at the top of the words, low
to high and word after word, hold the remaining slots (`slot_fields`).

    [rows / 64] tiles, each [blocks] in order of columns, each int16 [b, 64, L]

So a program that walks the columns of one tile reads one contiguous run, two neighbouring lanes
share a 32-bit register, and one shift and one mask take a slot out of both. Multiples of 64 rows
and 32 columns take no more bits than the plain layout (DeepSeek-V2-Lite's 1,408 columns are 5 × 256
+ 128, gpt-oss's 2,880 are 11 × 256 + 64). No Triton here: `quantize` shares this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # rows of a tile
SLOTS = 16
_LANES = (16, 8, 4, 2)  # lanes of a block, widest first
_COLS = SLOTS * _LANES[-1]  # columns are padded to a multiple of this
_CHUNK = 1 << 18  # codes worked on at a time: temporaries stay in the second-level cache


class Field(NamedTuple):
    """Where some bits of a slot lie.

    Attributes:
        word: which of the b words.
        shift: lowest of these bits in the word.
        width: number of bits.
        at: lowest of these bits in the code.
    """

    word: int
    shift: int
    width: int
    at: int


class Blocks(NamedTuple):
    """A run of equally wide blocks of a row.

    Attributes:
        first: first column.
        repeat: number of blocks.
        lanes: columns of one slot.
    """

    first: int
    repeat: int
    lanes: int

    @property
    def width(self) -> int:
        """Columns of all blocks."""
        return self.repeat * SLOTS * self.lanes


def slot_fields(bits: int) -> tuple[tuple[Field, ...], ...]:
    """Return the fields of each of the 16 slots: one field, or a few made of spare bits."""
    per = SLOTS // bits
    slots = [(Field(i // per, i % per * bits, bits, 0),) for i in range(per * bits)]
    spare = [(word, shift) for word in range(bits) for shift in range(per * bits, 16)]
    left: list[tuple[Field, ...]] = []
    for first in range(0, len(spare), bits):
        fields: list[Field] = []
        for at, (word, shift) in enumerate(spare[first : first + bits]):
            if fields and fields[-1].word == word:
                fields[-1] = fields[-1]._replace(width=fields[-1].width + 1)
            else:
                fields.append(Field(word, shift, 1, at))
        left.append(tuple(fields))
    return (*slots, *left)


def padded(rows: int, cols: int) -> tuple[int, int]:
    """Return rows and columns padded for tiles: to multiples of 64 and of 32."""
    return -(-rows // ROWS) * ROWS, -(-cols // _COLS) * _COLS


def blocks(cols: int) -> list[Blocks]:
    """Return the blocks of a row of `cols` weights, first column first."""
    runs, first, total = [], 0, padded(0, cols)[1]
    for lanes in _LANES:
        if repeat := (total - first) // (SLOTS * lanes):
            runs.append(Blocks(first, repeat, lanes))
            first += runs[-1].width
    return runs


def tile_bytes(rows: int, cols: int, bits: int) -> int:
    """Return the bytes of a matrix of codes in tiles."""
    height, width = padded(rows, cols)
    return height * width * bits // 8


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Return codes (integers below 2**bits, [rows, cols]) in tiles, int16 [tile_bytes / 2]."""
    rows, cols = codes.shape
    height, width = padded(rows, cols)
    if (height, width) != (rows, cols):
        codes = torch.nn.functional.pad(codes, (0, width - cols, 0, height - rows))
    tiles = codes.view(height // ROWS, ROWS, width)
    size = width // SLOTS * ROWS * bits
    out = torch.zeros(len(tiles), size, dtype=torch.int16, device=codes.device)
    for block, chunk, words in _pieces(out, cols, bits):
        part = tiles[chunk, :, block.first : block.first + block.width]
        shape = (len(part), ROWS, block.repeat, SLOTS, block.lanes)
        slots = part.reshape(shape).permute(3, 0, 2, 1, 4).to(torch.int16).contiguous()
        _fill(words, slots.view(torch.int32), bits)
    return out.view(-1)


def unpack_tiles(
    buffer: Tensor, bits: int, rows: int, cols: int, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Undo `pack_tiles`: return the codes [rows, cols] in a dtype that holds them."""
    height, width = padded(rows, cols)
    tiles = torch.empty(height // ROWS, ROWS, width, dtype=dtype, device=buffer.device)
    for block, chunk, words in _pieces(buffer.view(len(tiles), -1), cols, bits):
        part = tiles[chunk, :, block.first : block.first + block.width]
        slots = _drain(words, bits).view(torch.int16)
        shape = (len(part), ROWS, block.repeat, SLOTS, block.lanes)
        part.unflatten(2, shape[2:]).copy_(slots.permute(0, 3, 1, 2, 4))
    codes: Tensor = tiles.view(height, width)[:rows, :cols]
    return codes.contiguous()


def _pieces(buffer: Tensor, cols: int, bits: int) -> Iterator[tuple[Blocks, slice, Tensor]]:
    """Yield (blocks, tiles, their words int32 [tiles, blocks, bits, 64, lanes / 2]).

    Args:
        buffer: int16 [tiles, words of a tile]; the words are views of it.
        cols: weights of a row.
        bits: number of bits of a code.
    """
    at = 0
    for block in blocks(cols):
        size = block.width // SLOTS * ROWS * bits
        step = max(
            1, _CHUNK // (block.width * ROWS) if buffer.device.type == "cpu" else len(buffer)
        )
        for first in range(0, len(buffer), step):
            chunk = slice(first, first + step)
            words = buffer[chunk, at : at + size].view(torch.int32)
            yield block, chunk, words.unflatten(1, (block.repeat, bits, ROWS, block.lanes // 2))
        at += size


# Both directions work on two lanes at once: a field never crosses from one lane into the next.


def _fill(words: Tensor, slots: Tensor, bits: int) -> None:
    """Write slots int32 [16, tiles, blocks, 64, lanes / 2] into zeroed words."""
    for slot, fields in zip(slots, slot_fields(bits), strict=True):
        for field in fields:
            part = slot
            if field.width < bits:
                part = (slot >> field.at) & _both(field.width)
            # A shift written as a product, since torch vectorizes a + b · alpha; beyond bit 31 it
            # wraps.
            words[:, :, field.word].add_(part, alpha=1 << field.shift)


def _drain(words: Tensor, bits: int) -> Tensor:
    """Undo `_fill`: return slots int32 [tiles, blocks, 16, 64, lanes / 2]."""
    tiles, many, _, *tail = words.shape
    slots = torch.empty(tiles, many, SLOTS, *tail, dtype=torch.int32, device=words.device)
    per = SLOTS // bits
    inside = slots[:, :, : per * bits].unflatten(2, (bits, per))
    for k in range(per):  # all words at once
        torch.bitwise_right_shift(words, k * bits, out=inside[:, :, :, k])
    inside.bitwise_and_(_both(bits))
    for slot, fields in enumerate(slot_fields(bits)[per * bits :], per * bits):
        out = slots[:, :, slot].zero_()
        for field in fields:
            part = (words[:, :, field.word] >> field.shift).bitwise_and_(_both(field.width))
            out.add_(part, alpha=1 << field.at)
    return slots


def _both(width: int) -> int:
    """Return a mask of `width` bits in both lanes of a 32-bit register."""
    return ((1 << width) - 1) * 0x00010001
