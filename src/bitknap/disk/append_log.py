"""A journal of the finished parts of long work, from which a killed run continues.

JSON lines: a header that says what the work is about, then one line per finished part. Only the
last line can be incomplete; it is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitknap.disk.atomic import check_version, write_whole
from bitknap.errors import BitknapError, FileError, MismatchError

_KIND, _VERSION = "bitknap.journal", "1.0"
# Error numbers of a full disk.
FULL = (errno.ENOSPC, errno.EDQUOT)


def open_lines(
    path: Path, about: Mapping[str, Any], *, way_out: str = "choose another file"
) -> list[bytes]:
    """Return the lines of finished parts, in order; start the journal if there is none.

    Args:
        path: the journal; an incomplete last line is cut off the file.
        about: what the work is about, JSON values; must be what the journal was started with.
        way_out: what to do about a journal that cannot be used.

    Raises:
        FileError: the file cannot be read, is not a journal, or is a link, which may lead to a
            file that is none of this work's.
        MismatchError: the journal is about something else.
    """
    if path.is_symlink():
        raise FileError(f"{path}: is a link to {path.readlink()}, not a journal; {way_out}")
    if not path.exists():
        header = {"format": _KIND, "version": _VERSION, "about": dict(about)}
        write_whole(path, _line(header))
        return []
    lines = whole_lines(path)
    _check_header(path, lines[0] if lines else b"", about, way_out)
    size = sum(len(line) + 1 for line in lines)
    if size < path.stat().st_size:
        os.truncate(path, size)
    return lines[1:]


def whole_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a journal, including its header.

    Raises:
        FileError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    return content.split(b"\n")[:-1]


def append_lines(path: Path, parts: Iterable[Mapping[str, Any]]) -> None:
    """Add finished parts, and return when they are on the disk."""
    with path.open("ab") as file:
        file.write(b"".join(map(_line, parts)))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def keeping(out: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Add to errors of the block what is kept, from which the same command continues.

    Args:
        out: what the block writes.
        kept: function that returns this text, with a leading "; ", or "" for none.

    Raises:
        BitknapError: the disk is full.
    """
    try:
        yield
    except (BitknapError, KeyboardInterrupt) as error:
        raise type(error)(f"{str(error) or 'stopped'}{kept()}") from None
    except OSError as error:
        said = no_room(error)
        if not said:
            raise
        raise BitknapError(f"{out}: {said}{kept()}") from None


def no_room(error: OSError) -> str:
    """Return the problem and its remedy if a disk or a file is full, "" for other errors."""
    if error.errno in FULL:
        return "no space left on the disk; free some"
    if error.errno == errno.EFBIG:
        return "a file may not grow as large as needed; raise 'ulimit -f' or choose another disk"
    return ""


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"


def _check_header(path: Path, line: bytes, about: Mapping[str, Any], way_out: str) -> None:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise FileError(f"{path}: not a journal; {way_out}")
    check_version(header, _KIND, _VERSION, path)
    said = header.get("about")
    known = said if isinstance(said, dict) else {}
    wanted = json.loads(json.dumps(dict(about)))
    if known != wanted:
        names = sorted(wanted.keys() | known.keys())
        other = [name for name in names if known.get(name) != wanted.get(name)]
        raise MismatchError(
            f"{path}: the journal belongs to another {', '.join(other)}; give the inputs it was "
            f"started with, or {way_out}"
        )
