"""Optuna's journal of trials in a file: opened with care for files that are something else."""

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
    """Return the storage in a journal file, which is made if it is not there.

    Args:
        url: named in messages.
        path: the file.

    Raises:
        InputError: the file cannot be used, or holds something else, and is left as it is.
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
            if not _RECORD.startswith(first):  # Optuna would write behind a line of text
                raise InputError(f"storage {url}: not a journal of Optuna; choose another file")
        storage = JournalStorage(JournalFileBackend(file, lock))
        storage.get_all_studies()
        _mend(path, lock)
    except OSError as error:
        raise InputError(f"storage {url}: cannot be used ({error.strerror})") from None
    except (MemoryError, InputError):
        raise
    except Exception:
        # Optuna replays the file without checking it, and fails in whatever way a line is wrong.
        raise InputError(f"storage {url}: not a journal of Optuna; choose another file") from None
    return storage


def _mend(path: Path, lock: Any) -> None:
    """Cut an unfinished last line, which a machine that stopped in the middle of it left.

    Raises:
        ValueError: what follows the last whole line is nothing that Optuna writes.
    """

    def torn() -> bytes:
        content = path.read_bytes()
        return content[content.rfind(b"\n") + 1 :]

    if not torn():
        return
    lock.acquire()
    try:
        # Under the lock nobody writes: what is unfinished now stays so.
        rest = torn()
        if not _RECORD.startswith(rest[: len(_RECORD)]):
            raise ValueError(f"{rest[:20]!r} does not begin as a record does")
        os.truncate(path, path.stat().st_size - len(rest))
    finally:
        lock.release()
