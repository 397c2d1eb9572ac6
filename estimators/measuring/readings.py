"""The journal of measurements: finished readings and their exact values.

A reading's name says which units were changed and how, so that it can be reused: by the same
command after a kill, or by another estimator on the same inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.disk.append_log import append_lines, keeping, open_lines, whole_lines
from bitknap.disk.atomic import beside as beside_name
from bitknap.disk.atomic import folders_above, locked
from bitknap.disk.manifest import is_ours
from bitknap.disk.outputs import check_only, drop
from bitknap.errors import BitknapError, FileError, MismatchError

# Files of a pass over layers, see `shelf`.
_FILES = r"[0-9a-f]{12}\..+\.(bin|safetensors)"


class _Line(NamedTuple):
    """The values on one line of the journal, and the line's number; 0 for a new measurement."""

    number: int
    values: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The measurements in a journal; without a journal nothing is kept unless in memory.

    Attributes:
        path: the journal, or None.
        in_memory: keep measurements in memory where there is no journal.
        lines: the measurements, by key.
    """

    path: Path | None = None
    in_memory: bool = False
    lines: dict[str, _Line] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, about: Mapping[str, Any], *, way_out: str = "choose another file"
    ) -> Readings:
        """Return the readings of a journal; start it if there is none.

        Args:
            path: the journal; a torn last line is cut off the file.
            about: the inputs of the work, JSON values; must equal those that started the journal.
            way_out: the remedy that errors give for a journal that cannot be used.

        Raises:
            FileError: the file cannot be read, is not a journal, or is damaged before its last
                line.
            MismatchError: the journal belongs to other inputs.
        """
        lines = open_lines(path, about, way_out=way_out)
        parsed = (_parsed(path, number, line) for number, line in enumerate(lines, start=2))
        return cls(path=path, lines=dict(parsed))

    def known(self, key: str, size: int = 1) -> Floats | None:
        """Return the values of a reading, float64 [size]; None if not measured yet.

        Raises:
            FileError: the journal has a different number of values.
        """
        line = self.lines.get(key)
        if line is None:
            return None
        if line.values.shape != (size,):
            raise _damaged(self.path, line.number)
        return line.values

    def keep(self, key: str, values: npt.ArrayLike) -> None:
        """Add a reading and return once it is on disk; without a journal, do nothing on disk."""
        numbers = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if not np.isfinite(numbers).all():
            return
        if self.path is not None:
            append_lines(self.path, [{"key": key, "values": numbers.tolist()}])
        if self.path is not None or self.in_memory:
            self.lines[key] = _Line(0, numbers)


@contextlib.contextmanager
def beside(
    path: Path | None, about: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Readings]:
    """Yield the readings of the journal beside an output, and lock out other processes.

    The caller deletes the journal when the output is finished; an empty journal is deleted here.
    Errors raised in the block say how many readings are kept.

    Args:
        path: the journal; None keeps nothing.
        about: the inputs of the work.
        overwrite: start a new journal if this one cannot be used.

    Raises:
        MismatchError: the journal belongs to other inputs, and `overwrite` is false.
        FileError: it is no journal, and `overwrite` is false.
        InputError: another process is measuring for the same output.
    """
    if path is None:
        yield Readings()
        return
    check_only(folder_of(path), _FILES)
    with folders_above(path):
        readings = _opened(path, about, overwrite=overwrite)
        with locked(path, f"{path}: another process is measuring"):
            try:
                with telling(path):
                    yield readings
            finally:
                if not count(path):
                    forget(path)


def folder_of(path: Path) -> Path:
    """Return the folder beside a journal for data too large for it."""
    return beside_name(path, "files", hidden=False)


def forget(path: Path) -> None:
    """Delete a journal, if any, and the folder beside it; only what Bitknap wrote."""
    with contextlib.suppress(PermissionError):
        if is_ours(path):
            path.unlink(missing_ok=True)
    drop(folder_of(path), _FILES)


def count(path: Path) -> int:
    """Return how many readings a journal has; 0 if there is none."""
    return max(0, len(whole_lines(path)) - 1) if path.is_file() else 0


def telling(path: Path) -> contextlib.AbstractContextManager[None]:
    """Add to errors raised in the block how many readings are kept, if any.

    Raises:
        BitknapError: the disk is full.
    """

    def kept() -> str:
        readings = count(path)
        if not readings:
            return ""
        return f"; {readings} readings are kept in {path}, and the same command goes on from there"

    return keeping(path, kept)


def key_of(which: npt.ArrayLike, formats: Iterable[Format]) -> str:
    """Return 24 hex digits that name a reading, from integers and formats."""
    digest = hashlib.sha256(np.asarray(which, dtype="<i8").tobytes())
    digest.update(" ".join(item.name for item in formats).encode())
    return digest.hexdigest()[:24]


def _opened(path: Path, about: Mapping[str, Any], *, overwrite: bool) -> Readings:
    ours = not path.exists() or is_ours(path)
    way_out = f"pass `overwrite=True` or delete {path}" if ours else f"move {path} away"
    try:
        return Readings.open(path, about, way_out=way_out)
    except (MismatchError, FileError) as error:
        # A journal without readings can be replaced without loss.
        empty = isinstance(error, MismatchError) and not count(path)
        if not (ours and (overwrite or empty)):
            raise
    forget(path)
    return Readings.open(path, about, way_out=way_out)


def _parsed(path: Path, number: int, line: bytes) -> tuple[str, _Line]:
    try:
        part = json.loads(line)
        key, values = part["key"], np.array(part["values"], dtype=np.float64)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise _damaged(path, number) from None
    if not isinstance(key, str) or values.ndim != 1 or not np.isfinite(values).all():
        raise _damaged(path, number)
    return key, _Line(number, values)


def _damaged(path: Path | None, number: int) -> BitknapError:
    return FileError(
        f"{path}: line {number} is damaged; cut the file before it, or start a new one"
    )
