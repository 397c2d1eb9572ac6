"""Write files whole or not at all, and check the versions that they state."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from bitknap.errors import BitknapWarning, FileError, InputError

# Characters that a temporary file of `mkstemp` adds to a name, for which `beside` leaves room.
_RANDOM = 9


@contextlib.contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders above `path`; if the block fails, delete those that were made."""
    above = path.absolute().parents
    missing = [folder for folder in above if not folder.exists()]
    above[0].mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a folder with somebody else's file stays
            for folder in missing:
                folder.rmdir()
        raise


def beside(path: Path, suffix: str, *, hidden: bool = True) -> Path:
    """Return the path beside an output for what belongs to it: ".OUT.suffix" or "OUT.suffix".

    A name too long for the file system is cut, and made unique by 12 digits of its SHA-256.

    Args:
        path: the output, which need not exist.
        suffix: end of the name, without the dot.
        hidden: whether it begins with a dot.
    """
    named = path if path.name not in ("", "..") else path.resolve()
    start, end, name = "." * hidden, f".{suffix}", named.name
    room = name_limit(named) - _RANDOM - len(start) - len(end)
    if len(os.fsencode(name)) > room:
        digits = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        name = os.fsencode(name)[: room - 13].decode(errors="ignore") + f"~{digits}"
    return named.absolute().parent / f"{start}{name}{end}"


def name_limit(path: Path) -> int:
    """Return the maximum bytes of a file's name on the disk of `path`, which need not exist."""
    try:
        return os.pathconf(existing(path), "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255


def existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next((at for at in path.absolute().parents if os.path.lexists(at)), Path("/"))


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary file, fsync and rename."""
    with whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that becomes `path` if the block ends without an error.

    Temporary files of the same path that killed runs left are deleted.
    """
    with folders_above(path):
        start = beside(path, "tmp-")
        _drop_stale(start)
        handle, name = _temporary(start)
        try:
            with os.fdopen(handle, "rb"), Path(name).open("r+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                Path(name).chmod(0o644)
                Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        synced(path.absolute().parent)


def _temporary(start: Path) -> tuple[int, str]:
    """Make a file whose name begins like `start`, and hold its lock while it is open."""
    while True:
        handle, name = tempfile.mkstemp(dir=start.parent, prefix=start.name)
        try_lock(handle)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # another run deleted it before it was locked, as if left by a killed run


def _drop_stale(start: Path) -> None:
    """Delete files whose name begins like `start` and whose lock nobody holds."""
    with contextlib.suppress(OSError), os.scandir(start.parent) as entries:
        for entry in entries:
            rest = entry.name.removeprefix(start.name)
            if rest == entry.name or len(rest) != _RANDOM - 1 or not entry.is_file():
                continue
            handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if try_lock(handle):
                    Path(entry.path).unlink()
            finally:
                os.close(handle)


def try_lock(handle: int) -> bool:
    """Take the lock of an open file, and return whether no other process has it.

    On a file system without locks the answer is always True.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def synced(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and in the folders below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Keep other processes out of a file or folder while the block runs.

    Args:
        path: the file or folder to lock, which must exist.
        busy: message if another process holds the lock, without the remedy.

    Raises:
        InputError: another process holds the lock.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise InputError(f"{busy}; wait for that one")
        yield
    finally:
        os.close(handle)


def check_space(path: Path, needed: int) -> None:
    """Check that the disk of `path`, which need not exist yet, has room.

    Raises:
        InputError: fewer than `needed` bytes are free.
    """
    there = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{path}: needs {needed:,} bytes, the disk has {free:,} free; "
            "free some or choose a folder on another disk"
        )


def read_json(path: Path) -> Any:
    """Return the parsed JSON file, or raise FileError in one line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not valid JSON ({error})") from None


def check_version(header: Mapping[str, Any], kind: str, version: str, path: Path) -> None:
    """Check the `format` and `version` keys: another major is an error, a newer minor a warning.

    Args:
        header: the mapping that should hold `format` and `version`.
        kind: the wanted format, such as "bitknap.plan".
        version: what this library writes, "major.minor".
        path: named in messages.
    """
    if header.get("format") != kind:
        raise FileError(f"{path}: format: {header.get('format')!r} is not {kind!r}")
    stated = str(header.get("version", ""))
    if not re.fullmatch(r"\d+\.\d+", stated):
        raise FileError(f"{path}: version: {stated!r} is not of the form MAJOR.MINOR")
    (major, minor), (known_major, known_minor) = (
        tuple(map(int, v.split("."))) for v in (stated, version)
    )
    if major != known_major:
        raise FileError(f"{path}: version: {stated} cannot be read by this library ({version})")
    if minor > known_minor:
        warnings.warn(
            f"{path}: version {stated} is newer than {version}, so parts of it may be ignored",
            BitknapWarning,
            stacklevel=2,
        )
