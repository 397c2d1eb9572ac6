"""The journal of measurements: finished parts with their values, which read back to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation.arrays import Floats
from bitknap.errors import FileError
from bitknap.journal import append_lines, open_lines


def open_journal(
    path: Path, about: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Floats]:
    """Return the parts that are done, by key; start the journal if there is none.

    Args:
        path: the journal; a torn last line is cut off the file.
        about: what the work is about, JSON values; must be what the journal was started with.
        sizes: how many values each part has, by key.

    Raises:
        FileError: the file cannot be read, is not a journal, or is damaged before its last line.
        MismatchError: the journal is about something else.
    """
    lines = open_lines(path, about)
    return dict(_part(path, number, line, sizes) for number, line in enumerate(lines, start=2))


def append(path: Path, key: str, values: Floats) -> None:
    """Add a finished part, and return when it is on the disk."""
    append_lines(path, [{"key": key, "values": values.tolist()}])


def _part(path: Path, number: int, line: bytes, sizes: Mapping[str, int]) -> tuple[str, Floats]:
    try:
        part = json.loads(line)
        key, values = str(part["key"]), np.array(part["values"], dtype=np.float64)
    except (ValueError, KeyError, TypeError):
        key, values = "", np.zeros(0)
    if values.shape != (sizes.get(key, -1),):
        raise FileError(
            f"{path}: line {number} is damaged; cut the file before it, or start a new one"
        )
    return key, values
