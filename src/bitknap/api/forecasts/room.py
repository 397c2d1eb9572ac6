"""Refuses an output that the disk has no room for, before hours of measuring."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from bitknap.allocation.problem.table import storage
from bitknap.allocation.problem.table_file import least_size
from bitknap.api.requests import Formats, default_formats
from bitknap.disk.atomic import check_space
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.resume import Partial
from bitknap.quantization.source.checkpoint import Checkpoint


def check_table_room(
    source: Checkpoint, formats: Formats, include: Collection[str], table: Path
) -> None:
    """Check that a cost table fits on the disk.

    Args:
        source: the model.
        formats: the formats that its units may have.
        include: roles besides routed experts.
        table: the table, or a file beside it.

    Raises:
        InputError: the disk has less room than the table's columns take.
    """
    units = formats.layout(source, include).units
    options = formats.listed(source, include) or default_formats(units)
    check_space(table, least_size(len(units), len(options)))


def check_checkpoint_room(
    source: Checkpoint, formats: Formats, include: Collection[str], out: Path
) -> None:
    """Check that a packed checkpoint fits on the disk with every unit in its smallest format.

    What a run that was stopped has written already counts as room.

    Args:
        source: the model.
        formats: the formats that its units may have.
        include: roles besides routed experts.
        out: the folder to write.

    Raises:
        InputError: the disk has less room than that.
    """
    layout = formats.layout(source, include)
    sizes = storage(layout.units, formats.listed(source, include) or default_formats(layout.units))
    least = int(np.where(sizes < 0, 0, sizes).min(axis=1).sum())
    there = Partial(out=out, lines=()).allocated()
    check_space(out, writer.fixed_bytes(source, layout) + least - there)
