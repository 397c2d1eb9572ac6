"""Check for Optuna's tables in an SQLite file before Optuna adds those that are missing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from bitknap.errors import InputError

# Tables where Optuna keeps its version; it adds a row to an empty one.
_VERSIONS = ("version_info", "alembic_version")


def check_database(where: str, path: Path, *, create: bool) -> None:
    """Raise InputError unless an SQLite file holds Optuna's tables; nothing is changed.

    Args:
        where: the storage, as messages name it.
        path: the file.
        create: whether to accept a file without tables, in which Optuna then creates its own.
    """
    if not path.is_file() or (create and not path.stat().st_size):
        return
    # The next process to open the file rolls back a half-written transaction of a killed process,
    # which requires opening it for writing.
    mode = "rw" if os.access(path, os.W_OK) else "ro"
    address = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=60)) as database:
            present = _tables(database)
            empty = [name for name in _VERSIONS if name in present and not _filled(database, name)]
    except (sqlite3.Error, UnicodeError) as error:
        raise InputError(
            f"{where}: not a database that can be read ({str(error)[:100]}); choose another file"
        ) from None
    missing = sorted(_needed() - present)
    if (create and not present) or not (missing or empty):
        return
    why = f"has no table {missing[0]!r}" if missing else f"has an empty table {empty[0]!r}"
    raise InputError(
        f"{where}: it {why}, so it is not a database of this version of Optuna; choose another "
        "file, or upgrade it with 'optuna storage upgrade'"
    )


def _tables(database: sqlite3.Connection) -> set[str]:
    rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {str(name) for (name,) in rows}


def _filled(database: sqlite3.Connection, table: str) -> bool:
    return database.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone() is not None


def _needed() -> set[str]:
    from optuna.storages._rdb.models import BaseModel

    return {*BaseModel.metadata.tables, *_VERSIONS}
