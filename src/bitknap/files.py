"""Files appear whole or not at all, and say which version they are."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitknap.errors import FileError, InputError


@contextlib.contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those that were made go again if the block fails."""
    above = path.absolute().parents
    missing = [folder for folder in above if not folder.exists()]
    above[0].mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else's file in it: let it stand
            for folder in missing:
                folder.rmdir()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` by a temporary name, fsync and rename."""
    with folders_above(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` if the block ends without an error.

    Raises:
        InputError: `path` exists and `overwrite` is false.
    """
    check_free_name(path, overwrite=overwrite)
    with folders_above(path):
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield part
            move_into_place(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def check_free_name(path: Path, *, overwrite: bool) -> None:
    """Raise InputError if the folder `path` exists and may not be overwritten."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another folder or pass --overwrite")


def synced(path: Path) -> None:
    """Return when what was written to a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and in the folders below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def move_into_place(part: Path, path: Path) -> None:
    """Make the finished folder `part` become `path`, in the place of what is there."""
    for file in part.rglob("*"):
        synced(file)
    part.chmod(0o755)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    part.replace(path)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Keep other processes out of a file or folder while the block runs.

    Args:
        path: what is locked; it is there.
        busy: what to say when another process is in it, without the way out.

    Raises:
        InputError: another process is in it.
    """
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{busy}; wait for that one") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def check_space(path: Path, needed: int) -> None:
    """Refuse to start what the disk of `path`, which need not exist yet, has no room for.

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
    found = str(header.get("version", ""))
    if not re.fullmatch(r"\d+\.\d+", found):
        raise FileError(f"{path}: version: {found!r} is not MAJOR.MINOR")
    (major, minor), (ours, known) = (tuple(map(int, v.split("."))) for v in (found, version))
    if major != ours:
        raise FileError(f"{path}: version: {found} cannot be read by this library ({version})")
    if minor > known:
        warnings.warn(f"{path}: version {found} is newer than {version}", stacklevel=2)
