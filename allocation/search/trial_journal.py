"""Optuna's journal of trials in a file, opened without damaging files of another kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitknap.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

# How Optuna begins each line of a journal.
_RECORD = b'{"op_code":'


def open_journal(url: str, path: Path) -> BaseStorage:
    """Return the storage in a journal file, which is created if it is missing.

    Args:
        url: the URL shown in messages.
        path: the file.

    Raises:
        InputError: the file cannot be used or is not a journal; it is left unchanged.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    # Absolute, and not a symbolic link: a stale lock must be recognised from any folder.
    file = str(path.absolute())
    lock = JournalFileOpenLock(file)
    try:
        if path.exists():
            with path.open("rb") as opened:
                first = opened.read(len(_RECORD))
            if not _RECORD.startswith(first):  # Optuna would append after a line of text
                raise InputError(f"storage {url}: not a journal of Optuna; choose another file")
        storage = JournalStorage(JournalFileBackend(file, lock))
        storage.get_all_studies()
        _mend(path, lock)
    except OSError as error:
        raise InputError(f"storage {url}: cannot be used ({error.strerror})") from None
    except (MemoryError, InputError):
        raise
    except Exception:
        # Optuna replays the file without checking it, so a bad line can raise any error.
        raise InputError(f"storage {url}: not a journal of Optuna; choose another file") from None
    return storage


def _mend(path: Path, lock: Any) -> None:
    """Cut off an unfinished last line, left by a machine that stopped while writing it.

    Raises:
        ValueError: the text after the last whole line was not written by Optuna.
    """

    def torn() -> bytes:
        content = path.read_bytes()
        return content[content.rfind(b"\n") + 1 :]

    if not torn():
        return
    lock.acquire()
    try:
        # Nobody writes under the lock, so an unfinished line stays unfinished.
        rest = torn()
        if not _RECORD.startswith(rest[: len(_RECORD)]):
            raise ValueError(f"{rest[:20]!r} does not begin as a record does")
        os.truncate(path, path.stat().st_size - len(rest))
    finally:
        lock.release()
