"""Kinds: the storage of one expert's matrix as one integer, on which kernels specialize.

A layer's launch is compiled for the kinds that occur in it, and a program branches on the kind of
its expert. Experts that differ only in their offsets are of the same kind.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from bitknap.errors import InputError
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.layout.tiled_codes import SLOTS

_LEAST_GROUP = 2 * SLOTS  # columns of the narrowest block: a group may not end inside one
_WIDEST_BLOCK = 16 * SLOTS
_MOST_GROUP = (1 << 17) - 1  # largest that fits the bits in a kind's code
_KEPT = (None, torch.bfloat16, torch.float16, torch.float32)


class Kind(NamedTuple):
    """How a matrix is stored.

    Attributes:
        bits: number of bits of a code; of a weight if `kept`.
        share: bits of a group's share of its row's scale; 0 if a word holds an fp16 step.
        symmetric: 1 if no zero point is stored.
        kept: 0 for codes; 1, 2, 3 for a matrix in bf16, fp16, fp32.
        group: weights that share a word; 0 for a whole row.
        scaled: whether the matrix has an exponent (`exponents`).
    """

    bits: int
    share: int = 0
    symmetric: int = 0
    kept: int = 0
    group: int = 0
    scaled: bool = False

    @property
    def code(self) -> int:
        """The kind as one integer below 2^31; `Kind.of` undoes it."""
        low = self.bits | self.share << 6 | self.symmetric << 10 | self.kept << 11
        return low | self.group << 13 | self.scaled << 30

    @classmethod
    def of(cls, code: int) -> Kind:
        """Undo `code`."""
        group = code >> 13 & _MOST_GROUP
        scaled = bool(code >> 30)
        return cls(code & 63, code >> 6 & 15, code >> 10 & 1, code >> 11 & 3, group, scaled)

    @property
    def chunk(self) -> int:
        """Columns of a 256-column block that always share a word: 32, 64, 128 or 256."""
        return gcd(self.group, _WIDEST_BLOCK)

    @property
    def weight(self) -> float:
        """Bits per weight, words included; a program's time is proportional to it."""
        if self.kept:
            return float(self.bits)
        word = self.share + self.bits if self.share else 16 if self.symmetric else 32
        return self.bits + word / (self.group or _WIDEST_BLOCK * 4)


def kind_of(recipe: Recipe, cols: int, kept: torch.dtype | None) -> Kind:
    """Return the kind of a matrix of `cols` columns."""
    if recipe.kept:
        return Kind(bits=recipe.bits, kept=_KEPT.index(kept) if kept in _KEPT else 0)
    return Kind(
        bits=recipe.bits,
        share=recipe.share,
        symmetric=int(recipe.symmetric),
        group=0 if recipe.group >= cols else recipe.group,
        scaled=recipe.scaled,
    )


def check_runnable(kinds: tuple[Kind, ...]) -> None:
    """Raise unless kernels can run these kinds.

    Raises:
        InputError: a group ends inside a block of columns, or is too large.
    """
    for kind in kinds:
        if kind.group > _MOST_GROUP:
            raise InputError(
                f"group size {kind.group}: kernels take at most {_MOST_GROUP} or whole rows; "
                "load this checkpoint on the CPU, or quantize it with another group size"
            )
        if kind.group % _LEAST_GROUP:
            raise InputError(
                f"group size {kind.group}: kernels take multiples of {_LEAST_GROUP} or whole rows; "
                "load this checkpoint on the CPU, or quantize it with another group size"
            )
