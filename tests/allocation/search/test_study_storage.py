"""Storages of studies: torn, damaged, foreign or out of reach, each refused in one line."""

import contextlib
import json
import sqlite3
from typing import Any

import optuna
import pytest

from bitknap.allocation.search.best_trials import best, records
from bitknap.allocation.search.optuna_trials import open_storage, shown
from bitknap.allocation.search.search_space import Knobs
from bitknap.allocation.search.study import create, load, run
from bitknap.errors import (
    InputError,
)

TILTS = Knobs(tilts=("layer", "proj"))


def test_a_torn_journal_is_mended(table, tmp_path, design, loss):
    path = tmp_path / "s.log"
    made = create("s", str(path), table, design(knobs=TILTS))
    run(made, loss, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    study = load("s", str(path))
    assert path.read_bytes() == whole
    run(study, loss, 1)
    assert [record.state for record in records(load("s", str(path)))] == ["complete"] * 3


@pytest.mark.parametrize("content", [b"my thesis", b'{"my": 1}\n{"thesis"', b'{"opinion'])
def test_a_file_of_somebody_else_is_left_as_it_is(content, table, tmp_path, design):
    path = tmp_path / "notes.log"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a journal of Optuna"):
        load("s", str(path))
    with pytest.raises(InputError, match="not a journal of Optuna"):
        create("s", str(path), table, design())
    assert path.read_bytes() == content


def edited(path, where, change):
    """Apply `change` to a part of the first record of a journal that has it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(next(line[where] for line in lines if where in line))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("user_attr", lambda found: found["about"].update(seed="x")),
        ("user_attr", lambda found: found["about"]["table"].update(path=7)),
        ("user_attr", lambda found: found["about"]["knobs"].update(budget=[2, "a"])),
        ("directions", lambda found: found.append(1)),
    ],
)
def test_a_study_that_says_something_else_is_not_ours(where, change, table, tmp_path, design, loss):
    path = tmp_path / "s.log"
    run(create("s", str(path), table, design(knobs=TILTS)), loss, 1)
    edited(path, where, change)
    with pytest.raises(InputError, match="was not created by Bitknap; choose another"):
        load("s", str(path))


@pytest.mark.parametrize("attribute", [{"bytes": "many"}, {"predicted": [1]}, {"bpw": None}])
def test_trials_that_say_something_else_are_not_ours(attribute, table, tmp_path, design, loss):
    path = tmp_path / "s.log"
    made = create("s", str(path), table, design(knobs=TILTS))
    run(made, loss, 1)
    made.trials._storage.set_trial_user_attr(made.trials.ask()._trial_id, *attribute.popitem())
    with pytest.raises(InputError, match="was not created by Bitknap; choose another"):
        load("s", str(path))


@pytest.mark.slow
def test_a_dead_workers_lock_is_broken(table, tmp_path, monkeypatch, design, loss):
    monkeypatch.chdir(tmp_path)
    made = create("s", "journal:s.log", table, design(knobs=TILTS))
    (tmp_path / "s.log.lock").touch()
    storage: Any = made.trials._storage
    storage._backend._lock.grace_period = 1
    run(made, loss, 1)
    assert not (tmp_path / "s.log.lock").exists()


def test_existing_and_missing_studies(table, journal, design):
    create("s", journal, table, design())
    with pytest.raises(InputError, match=r"study 's' exists in .*; run it, or choose another name"):
        create("s", journal, table, design())
    with pytest.raises(InputError, match=r"study 't' is not in .*; there: s"):
        load("t", journal)
    with pytest.raises(InputError, match="study 's' has no complete trial; run it first"):
        best(load("s", journal))


def test_a_study_of_somebody_else_is_refused(table, journal):
    storage = open_storage(journal, create=True)
    optuna.create_study(study_name="foreign", storage=storage)
    with pytest.raises(InputError, match=r"study 'foreign' in .* was not created by Bitknap"):
        load("foreign", journal)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("sqlite:////nowhere/at/all.db", r"cannot be reached \(unable to open database file\)"),
        ("study.db", "Could not parse SQLAlchemy URL from given URL string; write one like sqlite"),
        ("nosuch://host/x", "Can't load plugin: sqlalchemy.dialects:nosuch; write one like sqlite"),
        ("mysql+nodriver://u:secret@h/x", r"write one like sqlite"),
        ("postgresql://u:secret@h/x", "driver psycopg2? is not installed; pip install psycopg"),
        ("journal:/nowhere/at/all.log", r"cannot be used \(No such file or directory\)"),
    ],
)
def test_unreachable_storages_are_one_line(table, storage, message, design):
    with pytest.raises(InputError, match=message) as error:
        create("s", storage, table, design())
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_missing_and_foreign_files(table, tmp_path):
    for name in ("sqlite:///x.db", "journal:x.log"):
        scheme, path = name.split("x.")
        url = f"{scheme}{tmp_path}/x.{path}"
        with pytest.raises(InputError, match="no such file; create a study in it first"):
            load("s", url)
    assert list(tmp_path.iterdir()) == [table]
    for suffix in ("log", "db"):
        (tmp_path / f"f.{suffix}").write_text("no journal and no database at all\n" * 50)
    with pytest.raises(InputError, match="not a journal of Optuna"):
        load("s", f"{tmp_path}/f.log")
    with pytest.raises(InputError, match="file is not a database"):
        load("s", f"sqlite:///{tmp_path}/f.db")


def test_passwords_are_not_shown():
    assert shown("postgresql://u:secret@h/x") == "postgresql://u:***@h/x"
    assert shown("journal:x.log") == "journal:x.log"
    assert shown("a b://secret") == "a b://…"


@pytest.mark.parametrize("content", [b"my notes\n", b"{}\n", b"[1]\n", b"\xff\xfe", b"[" * 10**5])
def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path, content):
    notes = tmp_path / "notes.txt"
    notes.write_bytes(content)
    with pytest.raises(InputError, match="not a journal of Optuna; choose another file"):
        open_storage(f"journal:{notes}", create=True)
    assert notes.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def notes(database):
    database.execute("CREATE TABLE thesis (page INTEGER, words TEXT)")


def without_a_table(database):
    database.execute("DROP TABLE trial_heartbeats")


def without_a_version(database):
    database.execute("DELETE FROM version_info")


@pytest.mark.parametrize("damage", [notes, without_a_table, without_a_version])
def test_a_database_that_is_not_optunas_is_left_as_it_is(damage, table, tmp_path, design):
    """Optuna would add its tables to it."""
    path = tmp_path / "s.db"
    if damage is not notes:
        create("s", f"sqlite:///{path}", table, design(knobs=TILTS))
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        damage(database)
    content = path.read_bytes()
    with pytest.raises(InputError, match=r"s\.db: it .* not a database of this version of Optuna"):
        load("s", f"sqlite:///{path}")
    with pytest.raises(InputError, match=r"s\.db: it .* not a database of this version of Optuna"):
        create("t", f"sqlite:///{path}", table, design(knobs=TILTS))
    assert path.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM trial_values",
        "UPDATE trial_values SET objective = 7",
        "UPDATE trial_params SET distribution_json = '{'",
        "UPDATE trial_user_attributes SET value_json = '['",
    ],
)
def test_a_damaged_study_in_a_database_is_one_line(damage, table, tmp_path, design, loss):
    url = f"sqlite:///{tmp_path}/s.db"
    run(create("s", url, table, design(knobs=TILTS)), loss, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute(damage)
    with pytest.raises(InputError, match=r"damaged|not of Bitknap"):
        load("s", url)
