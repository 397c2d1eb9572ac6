"""One unit's bytes in the layout for kernels: codes in tiles, then words, then row scales.

    codes   kernels/tiles
    words   kernels/words, one a group
    scale   fp16, one a row: compact metadata only

Rows are padded to a multiple of 64 and columns to a multiple of 32, and every part takes a multiple
of 64 bytes, so one launch can read a stack of units exactly as it is on disk. A unit that keeps its
source precision is its matrix, padded to a multiple of 64 bytes. Nothing is rounded on the way:
`to_tiles` and `to_plain` undo each other bit for bit. Exponents are in the signs of scales, as in
`plain_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.errors import FileError, InputError
from bitknap.kernels.experts_table import ExpertsTable, with_scaled
from bitknap.kernels.layout.exponents import split_exponent, with_exponent
from bitknap.kernels.layout.scale_words import Recipe, pack_words, tiled_rows, unpack_words
from bitknap.kernels.layout.tiled_codes import pack_tiles, unpack_tiles
from bitknap.quantization.packed.plain_bytes import decode, encode
from bitknap.quantization.rounding.grid import Grid, Quantized, top_share

_KEPT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def recipe(format: Format, rows: int, cols: int) -> Recipe:
    """Return what kernels must know about a matrix in this format.

    Raises:
        InputError: the format is made up and has no storage.
    """
    return Recipe(
        bits=format.bits,
        group=max(1, min(format.group_size or cols, cols)),
        share=format.share_bits,
        symmetric=format.symmetric,
        kept=0 if format.kind == "grid" else int(format.nbytes(rows, cols)),
    )


def tiled_bytes(format: Format, rows: npt.ArrayLike, cols: npt.ArrayLike) -> np.ndarray:
    """Return the bytes of stored matrices in tiles, int64, broadcast over `rows` and `cols`.

    They are `Format.nbytes` where rows are a multiple of 64, columns of 32, and metadata is fp16.
    """
    height, width = np.broadcast_arrays(np.asarray(rows, np.int64), np.asarray(cols, np.int64))
    shapes, where = np.unique(
        np.stack([height.ravel(), width.ravel()], 1), axis=0, return_inverse=True
    )
    sizes = [sum(recipe(format, r, c).part_bytes(r, c)) for r, c in shapes.tolist()]
    return np.array(sizes, dtype=np.int64)[where.ravel()].reshape(height.shape)


def encode_tiles(unit: Quantized) -> Tensor:
    """Return the unit's bytes, uint8 [tiled_bytes(format, rows, cols)]."""
    grid, format = unit.grid, unit.format
    rows, cols = unit.codes.shape
    scale = with_exponent(grid.scale, grid.only_exponent())
    steps = scale if grid.share is None else grid.share
    if format.compact and grid.share is None:
        steps = torch.full_like(scale, top_share(format), dtype=torch.uint8)
    words = pack_words(steps, grid.zero, recipe(format, rows, cols))
    parts = [pack_tiles(unit.codes, format.bits), words]
    if format.compact:
        parts.append(tiled_rows(scale))
    return torch.cat([part.view(-1).view(torch.uint8) for part in parts])


def decode_tiles(stream: Tensor, format: Format, rows: int, cols: int) -> Quantized:
    """Undo `encode_tiles`.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    codes, grid = open_tiles(stream, format, rows, cols)
    return Quantized(
        grid=grid, codes=unpack_tiles(codes.view(torch.int16), format.bits, rows, cols)
    )


def open_tiles(stream: Tensor, format: Format, rows: int, cols: int) -> tuple[Tensor, Grid]:
    """Return the bytes of a unit's codes, aligned for wider types, and its grid.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    _check_size("tiled", stream, format, rows, cols, int(tiled_bytes(format, rows, cols)))
    how = recipe(format, rows, cols)
    if stream.storage_offset() % 4:
        stream = stream.clone()
    codes, words, scales = stream.split(list(how.part_bytes(rows, cols)))
    steps, zero = unpack_words(words, how, rows)
    scale, share = steps, None
    if format.compact:
        scale = scales.view(torch.float16)[:rows].view(rows, 1)
        share = steps if steps.shape[1] > 1 else None
    scale, exponent = split_exponent(scale)
    grid = Grid(format=format, cols=cols, scale=scale, share=share, zero=zero)
    return codes, grid.with_exponent(exponent)


def to_tiles(stream: Tensor, format: Format, rows: int, cols: int) -> Tensor:
    """Convert a unit's bytes from the plain layout to tiles.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    if format.kind != "keep":
        return encode_tiles(decode(stream, format, rows, cols))
    _check_size("packed", stream, format, rows, cols, int(format.nbytes(rows, cols)))
    size = int(tiled_bytes(format, rows, cols))
    return torch.nn.functional.pad(stream, (0, size - len(stream)))


def to_plain(stream: Tensor, format: Format, rows: int, cols: int) -> Tensor:
    """Undo `to_tiles`: return a unit's bytes in the plain layout.

    Raises:
        FileError: the stream does not have the bytes that the format needs.
    """
    if format.kind != "keep":
        return encode(decode_tiles(stream, format, rows, cols))
    _check_size("tiled", stream, format, rows, cols, int(tiled_bytes(format, rows, cols)))
    return stream[: int(format.nbytes(rows, cols))].clone()


def experts_table(
    stack: Tensor, formats: Sequence[Format], rows: int, cols: int, blocks: int = 1
) -> ExpertsTable:
    """Return the table that one launch needs to read a stack of tiled units, back to back.

    Args:
        stack: uint8, such as one tensor of a checkpoint in tiles; not copied.
        formats: formats of each unit.
        rows: number of rows of each expert's matrix.
        cols: number of columns of each unit.
        blocks: number of units (blocks of rows) per matrix.

    Raises:
        InputError: the stack does not have the bytes that the formats need, a unit keeps a
            precision that kernels do not read, or blocks are not of one length.
    """
    sources = {f.source for f in formats if f.kind == "keep"}
    if len(sources) > 1 or not sources <= _KEPT.keys():
        raise InputError(
            f"units kept in {', '.join(sorted(sources))}: kernels read only one of "
            f"{', '.join(_KEPT)} beside codes; dequantize these units instead"
        )
    kept = _KEPT[sources.pop()] if sources else None
    recipes = [recipe(f, rows // blocks, cols) for f in formats]
    recipes = with_scaled(stack, recipes, rows // blocks, cols)
    return ExpertsTable.of(stack, recipes, rows, cols, kept, blocks)


def _check_size(
    kind: str, stream: Tensor, format: Format, rows: int, cols: int, needed: int
) -> None:
    if len(stream) != needed:
        raise FileError(
            f"{kind} unit {rows}x{cols} {format.name}: {len(stream)} bytes, not {needed}"
        )
