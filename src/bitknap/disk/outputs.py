"""Which outputs may be written: checked before any work, and again before one is replaced.

An output is never an input, inside one, or around one. `--overwrite` replaces only what this tool
wrote (`manifest`). The old output stays until the new one is complete on the disk. A kill at any
point leaves the old one or the new one, and perhaps hidden files that the next run cleans up:

    .OUT.new     a folder that is being written
    .OUT.old     the new folder before it is exchanged with OUT, or the old one after that
    .OUT.lock    who is writing OUT; that process holds the lock of the file
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from bitknap.disk import manifest
from bitknap.disk.atomic import beside, existing, folders_above, name_limit, synced, try_lock
from bitknap.errors import InputError

Kind = Literal["file", "folder"]


def check_output(
    path: Path,
    kind: Kind,
    *,
    overwrite: bool,
    inputs: Iterable[Path] = (),
    copied_from: Path | None = None,
) -> None:
    """Raise InputError unless an output may be written; nothing is changed.

    Args:
        path: the output.
        kind: whether it will be a file or a folder.
        overwrite: whether what is there may be replaced, if this tool wrote it.
        inputs: files and folders that are read, or written by the same command.
        copied_from: folder of the model, whose files an earlier version copied into the output.
    """
    _check_name(path)
    check_apart(path, inputs)
    _check_above(path, kind)
    if not os.path.lexists(path):
        return
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise InputError(f"{path} is a link to {path.readlink()}; name the {kind} itself")
    fits = stat.S_ISDIR(mode) if kind == "folder" else stat.S_ISREG(mode)
    if not fits:
        what = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a device"
        raise InputError(f"{path} is {what}, but the output is a {kind}; choose another name")
    if not overwrite:
        raise InputError(f"{path} exists; choose another name or pass `overwrite=True`")
    if kind == "folder":
        _check_replaceable(path)
        manifest.check_ours(path, copied_from)
    elif not manifest.is_ours(path):
        raise InputError(
            f"{path} was not written by Bitknap, so it is not replaced; move it away or choose "
            "another name"
        )


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError if an output is an input, lies in one or contains one.

    Paths are compared as the file system identifies them: links, "..", and other spellings of a
    name do not hide that two paths are one place.
    """
    real = Path(os.path.realpath(path))
    here, above = _identity(real), {_identity(folder) for folder in real.parents}
    for given in inputs:
        whole = Path(os.path.realpath(given))
        relation = ""
        if _identity(whole) == here:
            relation = "is"
        elif _identity(whole) in above:
            relation = "lies in"
        elif any(here in map(_identity, (at, *at.parents)) for at in _places(whole)):
            relation = "contains"
        if relation:
            raise InputError(
                f"{path} {relation} {given}, but an output may not overlap with anything else "
                "that the command reads or writes; choose another place"
            )


def _places(whole: Path) -> Iterator[Path]:
    """Yield an input and, for a folder, the real paths of its files."""
    yield whole
    if os.path.lexists(whole) and whole.is_dir():
        for file in whole.iterdir():
            if not file.is_dir():
                yield Path(os.path.realpath(file))


def _identity(path: Path) -> object:
    """Return a key that identifies a file or folder; its name if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return status.st_dev, status.st_ino


def _check_name(path: Path) -> None:
    if path.parts[:1] == ("~",):
        raise InputError(
            f"{path}: only a shell replaces ~ by your home folder; write the folder out"
        )
    if path.name and not path.name.strip():
        raise InputError(f"{str(path)!r}: the name is blank; choose another name")
    size, limit = len(os.fsencode(path.name)), name_limit(path)
    if size > limit:
        raise InputError(
            f"{path}: the name has {size} bytes, the file system takes {limit}; "
            "choose a shorter name"
        )


def _check_above(path: Path, kind: Kind) -> None:
    """Raise InputError unless the folder of an output can be written to, or made."""
    above = existing(path)
    if not above.exists():
        raise InputError(f"{path}: {above} is a broken link; choose another folder")
    if not above.is_dir():
        raise InputError(f"{path}: {above} is a file, not a folder; choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        fixed = os.statvfs(above).f_flag & os.ST_RDONLY
        why = "is on a read-only file system" if fixed else "may not be written to"
        raise InputError(f"{path}: {above} {why}; choose another folder")


def _check_replaceable(path: Path) -> None:
    if path.is_mount():
        raise InputError(f"{path} is a mount point, which cannot be replaced; name a folder in it")
    current, real = Path.cwd(), path.resolve()
    if real == current or real in current.parents:
        raise InputError(
            f"{path} contains the current folder; choose another name, or run the command elsewhere"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Keep other processes from writing an output while the block runs.

    The block may enter it again: a command holds it from its first check to its end, and functions
    that it calls hold it while they write.

    Raises:
        InputError: another process, or another thread of this one, is writing it.
    """
    with folders_above(path):
        lock = beside(path, "lock")
        handle = _lock(lock, path)
        try:
            yield
        finally:
            if handle is not None:
                lock.unlink(missing_ok=True)
                os.close(handle)


def _lock(lock: Path, path: Path) -> int | None:
    """Return the open lock file; None if this thread holds it already."""
    holder = f"bitknap {platform.node()} {os.getpid()} {threading.get_ident()}\n".encode()
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        is_free, content = try_lock(handle), os.pread(handle, 1 << 10, 0)
        if not is_free or (content and not content.startswith(b"bitknap ")):
            os.close(handle)
            if content == holder:
                return None
            if is_free:
                raise InputError(
                    f"{lock} is in the way and was not written by Bitknap; move it away"
                )
            raise InputError(f"{path}: another process is writing it; wait for that one")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                os.ftruncate(handle, 0)
                os.pwrite(handle, holder, 0)
                return handle
        os.close(handle)  # its former holder has deleted it


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` if the block ends without an error.

    Args:
        path: the folder to write.
        overwrite: whether what is there may be replaced, if this tool wrote it.
        inputs: files and folders that are read.

    Raises:
        InputError: `path` may not be written, or another process is writing it.
    """
    check_output(path, "folder", overwrite=overwrite, inputs=inputs)
    with writing(path):
        part = beside(path, "new")
        _discard(part)
        part.mkdir()
        try:
            manifest.sign(part)
            yield part
            manifest.sign(part)
            place(part, path, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def place(part: Path, path: Path, *, overwrite: bool, copied_from: Path | None = None) -> None:
    """Move a finished folder to `path`, replacing what is there; called inside `writing`.

    Args:
        part: the finished folder, with the list of its files.
        path: the output.
        overwrite: whether what is there may be replaced, if this tool wrote it.
        copied_from: as for `check_output`.

    Raises:
        InputError: what is there may not be replaced; `part` is left as it is.
    """
    for folder, _, files in os.walk(part, topdown=False):
        for file in files:
            synced(Path(folder, file))
        synced(Path(folder))
    part.chmod(0o755)
    aside = beside(path, "old")
    check_output(path, "folder", overwrite=overwrite, copied_from=copied_from)
    if not path.exists() or not any(path.iterdir()):
        part.rename(path)  # replaces an empty folder, and no other
        synced(path.absolute().parent)
        _discard_old(aside)
        return
    if manifest.listed(path) is None:  # an earlier version's: a folder put aside must be recognised
        manifest.sign(path)
    _discard_old(aside)
    part.rename(aside)
    if not _exchange(aside, path):
        aside.rename(part)
        path.rename(aside)
        part.rename(path)
    synced(path.absolute().parent)
    manifest.remove(aside)


def place_file(part: Path, path: Path, *, overwrite: bool) -> None:
    """Move a finished file to `path`, replacing what is there; called inside `writing`.

    Raises:
        InputError: what is there may not be replaced; `part` is left as it is.
    """
    synced(part)
    part.chmod(0o644)
    check_output(path, "file", overwrite=overwrite)
    part.replace(path)
    synced(path.absolute().parent)


def _discard(part: Path) -> None:
    """Delete an unfinished folder that a killed run left."""
    if not os.path.lexists(part):
        return
    started = all(manifest.MANIFEST in file.name for file in part.iterdir())
    if manifest.listed(part) is None and not started:
        raise InputError(f"{part} is in the way and was not written by Bitknap; move it away")
    shutil.rmtree(part)


def _discard_old(aside: Path) -> None:
    """Delete a replaced folder that a killed run left."""
    if not os.path.lexists(aside):
        return
    if manifest.listed(aside) is None and any(aside.iterdir()):
        raise InputError(f"{aside} is in the way and was not written by Bitknap; move it away")
    manifest.remove(aside)


def holds_only(folder: Path, names: str) -> bool:
    """Return whether a hidden working folder is Bitknap's: all names in it are known, none a link.

    Args:
        folder: a folder, which need not exist.
        names: pattern of the names; those of files that are being written count as well.
    """
    if not os.path.lexists(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return False
    # safetensors calls a file that it is writing .tmp and six letters or digits.
    known = re.compile(rf"(?:{names})|\..+\.(tmp-\w{{8}}|new|old|lock)|\.tmp[A-Za-z0-9]{{6}}")
    return all(known.fullmatch(x.name) and not x.is_symlink() for x in folder.iterdir())


def check_only(folder: Path, names: str) -> None:
    """Raise InputError if a hidden working folder is not Bitknap's; see `holds_only`."""
    if not holds_only(folder, names):
        raise InputError(f"{folder} is in the way and was not written by Bitknap; move it away")


def drop(folder: Path, names: str) -> None:
    """Delete a hidden working folder if it is Bitknap's; see `holds_only`.

    Files go before folders, since a file says that the folder beside it is finished; folders lose
    the list of their files last. So a kill leaves what is still recognised, and nothing that looks
    finished. A folder with a file that this tool did not write is left as it is.
    """
    if not (holds_only(folder, names) and folder.exists()):
        return
    with contextlib.suppress(InputError):
        for item in sorted(folder.iterdir(), key=Path.is_dir):
            if not item.is_dir():
                item.unlink()
            elif manifest.listed(item) is not None:
                manifest.remove(item)
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)
