"""Blocks: runs of output rows of one matrix, each a unit with a format of its own.

    matrix   rows 0 .. 767                     one unit, block 0
    4 blocks rows 0-191, 192-383, 384-575, …   four units, blocks 0 .. 3

Rows are rounded and stored one by one, so a matrix cut into blocks of one format has the same
weights as the whole matrix. Blocks need not be equal: a plan's units say how many rows each has.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitknap.allocation.problem.arrays import Longs, numbered
from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError, MismatchError
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.rounding.rounding import Inputs
from bitknap.quantization.stacks.quantize_plan import Watched


def block_units(units: Units, blocks: int) -> tuple[Units, Longs]:
    """Return the units cut into runs of rows, and the unit that each is cut from, int64[B].

    A matrix's blocks are consecutive; the first ones have one row more if rows do not divide.

    Args:
        units: whole matrices.
        blocks: number of blocks per matrix; a matrix with fewer rows has one block per row.

    Raises:
        InputError: blocks is below 1, or the units are cut already.
    """
    if blocks < 1:
        raise InputError(f"blocks: {blocks} must be at least 1")
    if units.block.any():
        raise InputError("units: they are already cut into blocks; cut the whole matrices")
    count = np.maximum(1, np.minimum(blocks, units.rows))
    source = np.repeat(np.arange(len(units)), count)
    block = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
    each, rest = units.rows // count, units.rows % count
    rows = each[source] + (block < rest[source])
    columns = {name: column[source] for name, column in units.to_arrays().items()}
    return replace(units, **columns | {"block": block.astype(np.int32), "rows": rows}), source


def split_rows(layout: Layout, blocks: int) -> Layout:
    """Return the layout with every matrix cut into `blocks` runs of rows, as `block_units` does.

    Raises:
        InputError: blocks is below 1, or the layout is cut already.
    """
    return layout_for(block_units(layout.units, blocks)[0], layout)


def layout_for(units: Units, layout: Layout) -> Layout:
    """Return the layout cut as `units` are, block by block in row order; unchanged if none is cut.

    Args:
        units: units of a plan or a table, in any order.
        layout: layout of whole matrices.

    Raises:
        MismatchError: the blocks of a matrix do not cover it exactly.
    """
    if not units.block.any():
        return layout
    source, order = _in_row_order(units, layout.units)
    whole, rows, block = layout.units, units.rows[order], units.block[order]
    first = np.concatenate([[0], np.flatnonzero(np.diff(source)) + 1])
    count = np.diff(np.concatenate([first, [len(source)]]))
    stop = np.cumsum(rows)
    stop = stop - np.repeat(stop[first] - rows[first], count)
    wrong = (block != np.arange(len(block)) - np.repeat(first, count)) | (rows < 1)
    wrong |= np.repeat(stop[first + count - 1], count) != whole.rows[source]
    wrong |= units.cols[order] != whole.cols[source]
    if wrong.any():
        raise MismatchError(
            f"{whole.label(int(source[wrong.argmax()]))}: the blocks do not make up its "
            f"{whole.rows[source[wrong.argmax()]]} rows; make a plan from a table of this model"
        )
    columns = {name: column[source] for name, column in whole.to_arrays().items()}
    columns |= {"block": block, "rows": rows}
    cut = Units.from_arrays(columns, whole.projections)
    places = zip(source.tolist(), (stop - rows).tolist(), stop.tolist(), strict=True)
    return replace(layout, units=cut, views=tuple(layout.views[i].rows(a, b) for i, a, b in places))


def whole_of(units: Units, whole: Units) -> Longs:
    """Return the index in `whole` of the unit that each block is cut from, int64[B].

    Raises:
        MismatchError: a block belongs to no unit of `whole`.
    """
    names = tuple(dict.fromkeys((*whole.projections, *units.projections)))
    vocabulary = [np.array([names.index(n) for n in u.projections]) for u in (whole, units)]
    keys = [
        (u.layer, u.role, u.expert, words[u.projection])
        for u, words in zip((whole, units), vocabulary, strict=True)
    ]
    # Whole matrices come first and are distinct, so their numbers are 0 .. U - 1.
    numbers = numbered(*(np.concatenate(pair) for pair in zip(*keys, strict=True)))[len(whole) :]
    foreign = numbers >= len(whole)
    if foreign.any():
        raise MismatchError(
            f"{units.label(int(foreign.argmax()))}: no such matrix in this model; "
            "make a plan from a table of this model"
        )
    return numbers.astype(np.int64)


def inputs_of_blocks(units: Units, whole: Units, inputs: Watched) -> Watched:
    """Return the input statistics of blocks: those of the matrix that each is cut from.

    Args:
        units: blocks.
        whole: the units that `inputs` knows.
        inputs: function from whole units of one shape to the statistics of their inputs.
    """
    source = whole_of(units, whole)

    def known(which: np.ndarray) -> Inputs:
        return inputs(source[which])

    return known


def _in_row_order(units: Units, whole: Units) -> tuple[Longs, Longs]:
    """Return the matrix that each block is from, sorted, and the order that sorts the blocks."""
    source = whole_of(units, whole)
    order = np.lexsort((units.block, source))
    missing = np.bincount(source, minlength=len(whole)) == 0
    if missing.any():
        raise MismatchError(
            f"{whole.label(int(missing.argmax()))}: the plan has no block of it; "
            "make a plan from a table of this model"
        )
    return source[order], order
