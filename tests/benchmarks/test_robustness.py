"""The campaigns against lost work, in a short form: nothing is lost."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import bitknap
from bitknap.benchmarks.robustness.mutate import BYTES, Edit, damaged_json, draw, shrunk
from bitknap.benchmarks.robustness.mutate_database import KINDS as DATABASE_KINDS
from bitknap.benchmarks.robustness.mutate_database import damaged_database
from bitknap.benchmarks.robustness.mutate_tensors import KINDS, damaged_tensors
from bitknap.testing import random_table, routed_units

# In a process of its own: children are forked, which threads of other tests do not survive.
_SHORT = """
import sys
from pathlib import Path
from bitknap.benchmarks.robustness.__main__ import run
from bitknap.benchmarks.robustness.circumstances import CIRCUMSTANCES

counts = {"malformed": 30, "kill": 1, "disk": 2, "circumstances": 1}
commands = ["quantize by a plan", "study run, journal"]
run(Path(sys.argv[1]), counts, 1, print, [*commands, *CIRCUMSTANCES])
"""


@pytest.mark.campaign
def test_a_short_campaign_finds_no_fault(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(bitknap.__file__).parent.parent)}
    subprocess.run(
        [sys.executable, "-c", _SHORT, str(tmp_path)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=900,
    )
    document = json.loads((tmp_path / "robustness.json").read_text())
    assert document["faults"] == []
    cases = {
        part: sum(group["cases"] for group in groups.values())
        for part, groups in document["parts"].items()
    }
    assert cases == {"malformed": 30, "kill": 2, "disk": 2, "circumstances": 6}


def test_damage_is_the_same_for_a_seed_and_never_fails(tmp_path):
    from bitknap.allocation import formats

    path = tmp_path / "table.safetensors"
    random_table(routed_units(1, 2), formats((2, 4), (8,))).save(path)
    content = path.read_bytes()
    sound = json.dumps({"a": [1, {"b": "c"}], "d": {}}).encode()
    seen = set()
    for seed in range(300):
        edits = draw((*KINDS, *BYTES), seed)
        assert edits == draw((*KINDS, *BYTES), seed)
        assert damaged_tensors(content, edits) == damaged_tensors(content, edits)
        seen.add(damaged_json(sound, draw(("value", *BYTES), seed)))
    assert len(seen) > 150


def test_a_damaged_database_is_a_file_again_and_the_same_for_a_seed(tmp_path):
    path = tmp_path / "study.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE one (id INTEGER PRIMARY KEY, value TEXT, number INTEGER)")
        database.execute("INSERT INTO one (value, number) VALUES ('{\"a\": 1}', 2), (NULL, 3)")
    content = path.read_bytes()
    seen = set()
    for seed in range(200):
        edits = draw(DATABASE_KINDS, seed)
        damaged = damaged_database(content, edits)
        assert damaged == damaged_database(content, edits)
        assert damaged.startswith(b"SQLite format 3")
        seen.add(damaged)
    assert len(seen) > 40
    assert damaged_database(content, [Edit("whole", 3)]) != content


def test_the_fewest_edits_that_fail_are_found():
    edits = [Edit("value", 1), Edit("cut", 2), Edit("flip", 3)]
    assert shrunk(edits, lambda some: edits[1] in some) == [edits[1]]
    assert shrunk(edits, lambda some: {edits[0], edits[2]} <= set(some)) == [edits[0], edits[2]]
