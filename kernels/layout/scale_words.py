"""How scales and zeros lie in memory for kernels: one word per group, 64 rows side by side.

A group's word holds everything that a kernel loads for it, and is as narrow as possible:

    32 bits   low half the step s, high half m, the value of code 0, both fp16     x ≈ s q + m
    16 bits   s, fp16, symmetric                                                   x ≈ s (q - mid)
    8 or 16   low bits a share of the row's fp16 scale, above them an integer      x ≈ s (q - z)
              zero of b bits unless symmetric; s = row scale · share / (2^share bits - 1)

mid is (2^b - 1) / 2. Nothing is rounded in this conversion, which is why a symmetric grid has no m:
it needs more digits than fp16 has. A kernel that needs m computes -s · mid or -s · z in float32.
Signs of the first fp16 steps or row scales may hold an exponent of the matrix (`exponents`). Rows
are filled up to a multiple of 64 with zeros, which stand for weights of 0:

    [rows / 64] tiles, each [groups, 64], so that one tile's words are one contiguous run
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitknap.kernels.layout.tiled_codes import ROWS, padded, tile_bytes

ALIGNMENT = 64  # bytes: a multiple of every part's size, so each begins at a wide load's address
_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one matrix is stored, as far as kernels depend on it.

    Attributes:
        bits: number of bits of a code; of a weight, if `kept`.
        group: weights of a row that share a word, at least 1; the last group may have fewer.
        share: bits of a group's share of its row's scale; 0 if the word holds an fp16 step.
        symmetric: whether no zero point is stored.
        kept: bytes of a matrix in the source's precision, row after row and without words; 0 for
            codes.
        scaled: whether signs of scales hold an exponent other than 0 (`exponents`).
    """

    bits: int
    group: int
    share: int = 0
    symmetric: bool = False
    kept: int = 0
    scaled: bool = False

    @property
    def word(self) -> int:
        """Bits of a group's word: 8, 16 or 32; 0 if kept."""
        if self.kept:
            return 0
        if not self.share:
            return 16 if self.symmetric else 32
        return 8 if self.share + (0 if self.symmetric else self.bits) <= 8 else 16

    def part_bytes(self, rows: int, cols: int) -> tuple[int, int, int]:
        """Return the bytes of codes, of words and of row scales; they lie in this order.

        Each is a multiple of 64; a kept matrix (all in the first part) is padded to one.
        """
        if self.kept:
            return -(-self.kept // ALIGNMENT) * ALIGNMENT, 0, 0
        height, _ = padded(rows, cols)
        words = height * -(-cols // self.group) * self.word // 8
        return tile_bytes(rows, cols, self.bits), words, 2 * height if self.share else 0


def pack_words(steps: Tensor, zeros: Tensor | None, recipe: Recipe) -> Tensor:
    """Return the words of a matrix, uint8, int16 or int32 [rows / 64, groups, 64].

    Args:
        steps: fp16 or, where `recipe.share`, uint8 [rows, groups].
        zeros: fp16 value of code 0 or, where `recipe.share`, uint8 integer zero, [rows, groups];
            None when symmetric.
        recipe: how the matrix is stored.
    """
    if recipe.share:
        words = steps.int()
        if zeros is not None:
            words = words | zeros.int() << recipe.share
        return tiled_rows(words.to(_DTYPES[recipe.word]))
    if zeros is None:
        return tiled_rows(steps.contiguous().view(torch.int16))
    return tiled_rows(torch.stack([steps, zeros], -1).view(torch.int32).squeeze(-1))


def unpack_words(words: Tensor, recipe: Recipe, rows: int) -> tuple[Tensor, Tensor | None]:
    """Undo `pack_words`: return steps and zeros.

    Args:
        words: as bytes, uint8.
        recipe: how the matrix is stored.
        rows: number of rows of the matrix.
    """
    height, _ = padded(rows, 0)
    typed = words.view(_DTYPES[recipe.word]).view(height // ROWS, -1, ROWS)
    flat = _own(typed.transpose(1, 2).reshape(height, -1)[:rows])
    if not recipe.share:
        halves = flat.view(torch.float16).view(rows, typed.shape[1], -1)
        return _own(halves[..., 0]), None if recipe.symmetric else _own(halves[..., 1])
    steps = (flat.int() & ((1 << recipe.share) - 1)).to(torch.uint8)
    if recipe.symmetric:
        return steps, None
    return steps, ((flat.int() >> recipe.share) & ((1 << recipe.bits) - 1)).to(torch.uint8)


def tiled_rows(values: Tensor) -> Tensor:
    """Return values [rows, n] in tiles, [rows / 64, n, 64], zero past the last row."""
    rows, count = values.shape
    height, _ = padded(rows, 0)
    filled = torch.nn.functional.pad(values, (0, 0, 0, height - rows))
    return filled.view(height // ROWS, ROWS, count).transpose(1, 2).contiguous()


def _own(values: Tensor) -> Tensor:
    # `contiguous` keeps odd strides of size-1 dimensions, which views of another dtype reject.
    return values.clone(memory_format=torch.contiguous_format)
