"""All experts of one projection of a layer, as one launch reads them; and their dequantization.

Experts of any widths, group sizes and metadata lie back to back in one buffer. Small tensors on the
same device describe each, so that a program looks up its expert's width and offsets, and nothing is
decided on the host. If experts are cut into row blocks, each block has its own width: then the
blocks lie back to back and have entries, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.kernels.layout.exponents import ROWS, split_exponent, times_power
from bitknap.kernels.layout.kinds import Kind, kind_of
from bitknap.kernels.layout.scale_words import Recipe, unpack_words
from bitknap.kernels.layout.tiled_codes import unpack_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsTable:
    """The experts [E] of one projection, each [rows, cols], B blocks of rows each.

    Attributes:
        rows: outputs of each expert.
        cols: inputs of each expert. A kernel must read inputs past the last column as 0: the codes
            there are 0, which may stand for a nonzero weight.
        buffer: every block's codes (`tiles`), words (`words`) and row scales fp16, int32 [n].
        bits: number of bits of a code, or of a kept weight, int32 [E · B].
        group: weights that share a word, int32 [E · B].
        word: bits of a word: 8, 16, 32; 0 where kept in source precision. int32 [E · B].
        share: bits of the scale share in a word, 0 for an fp16 step, int32 [E · B].
        symmetric: 1 where no zero point is stored, int32 [E · B].
        codes_at: offset of the codes in `buffer`, in its elements, int64 [E · B].
        words_at: offset of the words, int64 [E · B].
        rows_at: offset of the row scales, int64 [E · B]; the end of the words if there are none.
        kind: `kinds.Kind.code`, on which a program branches, int32 [E · B].
        order: experts, most bits first, int32 [E]: the longest tiles should start early.
        recipes: the same information on the host [E · B].
        kept: dtype of experts in source precision, if there are any.
        blocks: B, the number of row blocks per expert, all of equal length.
    """

    rows: int
    cols: int
    buffer: Tensor
    bits: Tensor
    group: Tensor
    word: Tensor
    share: Tensor
    symmetric: Tensor
    codes_at: Tensor
    words_at: Tensor
    rows_at: Tensor
    kind: Tensor
    order: Tensor
    recipes: tuple[Recipe, ...]
    kept: torch.dtype | None = None
    blocks: int = 1

    @classmethod
    def of(
        cls,
        buffer: Tensor,
        recipes: Sequence[Recipe],
        rows: int,
        cols: int,
        kept: torch.dtype | None = None,
        blocks: int = 1,
    ) -> ExpertsTable:
        """Return the table of experts that lie back to back in `buffer`, without copying it.

        Args:
            buffer: uint8; copied only if its storage offset is not aligned.
            recipes: how each block of each expert is stored.
            rows: outputs of each expert.
            cols: inputs of each expert.
            kept: dtype of experts in source precision.
            blocks: number of row blocks of each expert.

        Raises:
            InputError: the buffer does not have the bytes that the recipes need, or blocks differ
                in length.
        """
        sizes = _part_sizes(len(buffer), recipes, rows, cols, blocks)
        ends = sizes.view(-1).cumsum(0).view(-1, 3)
        begins = (ends - sizes) // 4
        device = buffer.device
        codes_at, words_at, rows_at = (b.contiguous().to(device) for b in begins.unbind(1))
        kinds = [kind_of(r, cols, kept) for r in recipes]

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(
            rows=rows,
            cols=cols,
            buffer=(buffer.clone() if buffer.storage_offset() % 4 else buffer).view(torch.int32),
            bits=column([r.bits for r in recipes]),
            group=column([r.group for r in recipes]),
            word=column([r.word for r in recipes]),
            share=column([r.share for r in recipes]),
            symmetric=column([int(r.symmetric) for r in recipes]),
            codes_at=codes_at,
            words_at=words_at,
            rows_at=rows_at,
            kind=column([kind.code for kind in kinds]),
            order=column(_heaviest_first(kinds, blocks)),
            recipes=tuple(recipes),
            kept=kept,
            blocks=blocks,
        )

    def __len__(self) -> int:
        return len(self.recipes) // self.blocks

    @property
    def long(self) -> int:
        """Number of rows in a block."""
        return self.rows // self.blocks

    def kind_list(self) -> list[Kind]:
        """Return the kind of every block of every expert [E · B]."""
        return [kind_of(recipe, self.cols, self.kept) for recipe in self.recipes]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that occur, each once, most bits first."""
        return tuple(sorted(set(self.kind_list()), key=lambda kind: (-kind.weight, kind)))

    def parts(self, entry: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return one block's codes, words and row scales as bytes, uint8 views of the buffer."""
        first = 4 * int(self.codes_at[entry])
        sizes = self.recipes[entry].part_bytes(self.long, self.cols)
        whole = self.buffer.view(torch.uint8)[first : first + sum(sizes)]
        codes, words, scales = whole.split(list(sizes))
        return codes, words, scales


def _part_sizes(given: int, recipes: Sequence[Recipe], rows: int, cols: int, blocks: int) -> Tensor:
    """Return the bytes of each block's codes, words and row scales, int64 [E · B, 3].

    Raises:
        InputError: the total is not `given` bytes, or blocks differ in length.
    """
    if rows % blocks or len(recipes) % blocks:
        raise InputError(
            f"experts {rows}x{cols}: {rows} rows do not make {blocks} blocks of one length; "
            "dequantize these units instead"
        )
    long = rows // blocks
    sizes = torch.tensor([r.part_bytes(long, cols) for r in recipes], dtype=torch.int64)
    needed = int(sizes.sum())
    if given != needed:
        raise InputError(
            f"experts {len(recipes)} x {long}x{cols}: {given} bytes, not {needed}; "
            "pass a stack in the layout for kernels"
        )
    return sizes


def _heaviest_first(kinds: Sequence[Kind], blocks: int) -> list[int]:
    """Return the numbers of experts, the one with the most bits first."""
    firsts = range(0, len(kinds), blocks)
    weights = [sum(kind.weight for kind in kinds[first : first + blocks]) for first in firsts]
    return sorted(range(len(weights)), key=lambda expert: -weights[expert])


def with_scaled(buffer: Tensor, recipes: Sequence[Recipe], rows: int, cols: int) -> list[Recipe]:
    """Return the recipes with `scaled` set from the bytes: whether each matrix has an exponent.

    Args:
        buffer: bytes of all matrices back to back, uint8.
        recipes: recipe of each.
        rows: number of rows of each.
        cols: number of columns of each.
    """
    begin, places = 0, []
    for recipe in recipes:
        codes, words, scales = recipe.part_bytes(rows, cols)
        at, width = (codes + words, 2) if recipe.share else (codes, recipe.word // 8)
        # Offsets of the bytes with scale signs in the first rows; kept matrices have none and use
        # 0.
        signs = [begin + at + width * row + 1 for row in range(min(ROWS, rows))]
        places.append([-1] if recipe.kept else signs)
        begin += codes + words + scales
    if begin != len(buffer) or not any(place[0] >= 0 for place in places):
        return list(recipes)
    wanted = max(map(len, places))
    index = torch.tensor([place + place[-1:] * (wanted - len(place)) for place in places])
    negative = buffer[index.clamp_min(0).to(buffer.device)] >> 7 == 1
    flags = (negative.cpu() & (index >= 0)).any(1).tolist()
    return [replace(recipe, scaled=scaled) for recipe, scaled in zip(recipes, flags, strict=True)]


def dequantize_tiles(table: ExpertsTable) -> Tensor:
    """Return the weights that kernels must reproduce, float32 [E, rows, cols].

    The operations and their order match `Quantized.dequantize` bit for bit.
    """
    return torch.stack([expert_weights(table, expert) for expert in range(len(table))])


def expert_weights(table: ExpertsTable, expert: int) -> Tensor:
    """Return one expert's weights as `dequantize_tiles` does, float32 [rows, cols]."""
    entries = range(expert * table.blocks, (expert + 1) * table.blocks)
    return torch.cat([_block_weights(table, entry) for entry in entries])


def _block_weights(table: ExpertsTable, entry: int) -> Tensor:
    """Return one block's weights, float32 [long, cols]."""
    recipe, rows, cols = table.recipes[entry], table.long, table.cols
    codes, words, scales = table.parts(entry)
    if recipe.kept:
        if table.kept is None:
            expert = entry // table.blocks
            raise InputError(f"expert {expert} is kept in source precision; pass its dtype as kept")
        weights: Tensor = codes[: recipe.kept].view(table.kept).view(rows, cols).float()
        return weights
    q = unpack_tiles(codes.view(torch.int16), recipe.bits, rows, cols).float()
    steps, zeros = unpack_words(words, recipe, rows)
    if recipe.share:
        row, exponent = split_exponent(scales.view(torch.float16)[:rows, None])
        s = row.float() * (steps.float() / (2**recipe.share - 1))
    else:
        steps, exponent = split_exponent(steps)
        s = steps.float()
    s = _spread(s, recipe, cols)
    if zeros is None:
        levels: int = 2**recipe.bits - 1
        x = (q - levels / 2) * s
    else:
        z = _spread(zeros.float(), recipe, cols)
        x = (q - z) * s if recipe.share else q * s + z
    return times_power(x, exponent)


def _spread(values: Tensor, recipe: Recipe, cols: int) -> Tensor:
    """Expand per-group values [rows, groups] to per-weight values [rows, cols]."""
    return values.repeat_interleave(recipe.group, 1)[:, :cols]
