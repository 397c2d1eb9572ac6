"""Damage an SQLite file: the values in its rows, rows, tables, or its bytes."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from bitknap.benchmarks.robustness.mutate import NASTY, Edit, damaged_bytes, damaged_value

# "value" damages one field, "row" deletes or repeats one row, "table" one table.
KINDS = ("value", "row", "table")


def damaged_database(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Return an SQLite file after the edits; those of bytes come last."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    try:
        database.deserialize(content)
        # Texts may be anything that a file can hold, also what is no UTF-8.
        database.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        for kind, seed in edits:
            chance = random.Random(seed)
            table = _table(database, chance, filled=kind != "table") if kind in KINDS else None
            if table is not None:
                _EDITS[kind](database, table, chance)
        found = database.serialize()
    finally:
        database.close()
    return damaged_bytes(found, [edit for edit in edits if edit.kind not in KINDS])


def _value(database: sqlite3.Connection, table: str, chance: random.Random) -> None:
    columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]
    rows = [row[0] for row in database.execute(f'SELECT rowid FROM "{table}"')]
    column, at = chance.choice(columns), chance.choice(rows)
    before = database.execute(f'SELECT "{column}" FROM "{table}" WHERE rowid = ?', (at,))
    found = _other(before.fetchone()[0], chance)
    _tried(database, f'UPDATE OR IGNORE "{table}" SET "{column}" = ? WHERE rowid = ?', (found, at))


def _other(value: Any, chance: random.Random) -> Any:
    """Return another value that a field can hold; half of the JSON texts stay JSON."""
    if isinstance(value, str) and chance.random() < 0.5:
        try:
            return json.dumps(damaged_value(json.loads(value), chance))
        except ValueError:
            pass
    found = chance.choice(NASTY)
    if isinstance(found, str):
        return found.encode("utf-8", "surrogatepass") if chance.random() < 0.2 else _text(found)
    fits = not isinstance(found, int) or -(2**63) <= found < 2**63
    return found if fits and isinstance(found, int | float | None) else _text(str(found)[:100])


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _row(database: sqlite3.Connection, table: str, chance: random.Random) -> None:
    at = chance.choice([row[0] for row in database.execute(f'SELECT rowid FROM "{table}"')])
    if chance.random() < 0.7:
        _tried(database, f'DELETE FROM "{table}" WHERE rowid = ?', (at,))
        return
    keys = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")') if not row[5]]
    names = ", ".join(f'"{key}"' for key in keys)
    _tried(
        database,
        f'INSERT INTO "{table}" ({names}) SELECT {names} FROM "{table}" WHERE rowid = ?',
        (at,),
    )


def _whole_table(database: sqlite3.Connection, table: str, chance: random.Random) -> None:
    how = chance.randrange(4)
    if how == 0:
        _tried(database, f'DROP TABLE "{table}"')
    elif how == 1:
        _tried(database, f'DELETE FROM "{table}"')
    elif how == 2:
        _tried(database, f'ALTER TABLE "{table}" RENAME TO "others"')
    else:
        columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]
        _tried(database, f'ALTER TABLE "{table}" RENAME COLUMN "{chance.choice(columns)}" TO "x"')


def _table(database: sqlite3.Connection, chance: random.Random, *, filled: bool) -> str | None:
    """Return the name of a table, of one with rows where `filled`; None if there is none."""
    names = [
        row[0]
        for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not row[0].startswith("sqlite_")
    ]
    if filled:
        count = 'SELECT count(*) FROM "{}"'
        names = [name for name in names if database.execute(count.format(name)).fetchone()[0]]
    return chance.choice(names) if names else None


def _tried(database: sqlite3.Connection, text: str, values: tuple[Any, ...] = ()) -> None:
    """Run a statement; one that the tables' own rules refuse changes nothing."""
    try:
        database.execute(text, values)
    except sqlite3.DatabaseError:
        return


_EDITS: dict[str, Callable[[sqlite3.Connection, str, random.Random], None]] = {
    "value": _value,
    "row": _row,
    "table": _whole_table,
}
