"""A part of a unit's matrix, as one of several devices holds it, cut out of the stored bytes.

Nothing is rounded: codes are taken as they are, with the scales of the groups that they belong to.
So a part begins and ends where groups do.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.quantization.packed.plain_bytes import decode
from bitknap.quantization.packed.tiled_bytes import (
    decode_tiles,
    encode_tiles,
    tiled_bytes,
    to_plain,
    to_tiles,
)


def check_columns(format: Format, cols: int, part: range) -> None:
    """Raise unless a part's columns begin and end at borders of groups.

    Args:
        format: how the whole matrix is stored.
        cols: its columns.
        part: the columns of the part.

    Raises:
        InputError: they do not.
    """
    size = format.group_size or cols
    inside = [at for at in (part.start, part.stop) if at % size and at != cols]
    if format.kind == "grid" and size < cols and inside:
        raise InputError(f"column {inside[0]} is inside a group of {size}")


def tiles_of_part(
    stream: Tensor, format: Format, shape: tuple[int, int], part: tuple[range, range], layout: str
) -> Tensor:
    """Return the bytes, in tiles, of some rows and columns of a unit's matrix, uint8.

    Args:
        stream: the unit's bytes.
        format: how it is stored.
        shape: its rows and columns.
        part: the rows and columns of the part.
        layout: byte layout of the stream, "plain" or "tiles".

    Raises:
        InputError: a column of the part begins or ends inside a group.
        FileError: the stream does not have the bytes that the format needs.
    """
    rows, cols = part
    if (len(rows), len(cols)) == shape:
        return stream if layout == "tiles" else to_tiles(stream, format, *shape)
    check_columns(format, shape[1], cols)
    if format.kind == "keep":
        plain = stream if layout == "plain" else to_plain(stream, format, *shape)
        whole = plain.view(*shape, format.bits // 8)
        kept = whole[rows.start : rows.stop, cols.start : cols.stop].reshape(-1)
        return functional.pad(kept, (0, int(tiled_bytes(format, len(rows), len(cols))) - len(kept)))
    unit = (decode_tiles if layout == "tiles" else decode)(stream, format, *shape)
    return encode_tiles(unit.rows(rows.start, rows.stop).columns(cols.start, cols.stop))
