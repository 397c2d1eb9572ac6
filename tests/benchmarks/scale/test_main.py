"""The benchmark of scale on a tiny model: each step runs, and the report says what it found."""

import json
from dataclasses import replace

import pytest

from bitknap.benchmarks.models.shapes import shape_of
from bitknap.benchmarks.quantize.large_checkpoint import small
from bitknap.benchmarks.scale.__main__ import MODEL, run
from bitknap.benchmarks.scale.main_job import Job, digest
from bitknap.benchmarks.scale.report import markdown
from bitknap.benchmarks.watched import killed_after, watched
from bitknap.errors import BitknapError


@pytest.mark.campaign
def test_a_toy_run_takes_every_step(tmp_path):
    job = Job(
        shape=replace(small(shape_of(MODEL)), vocabulary=4096),
        tokens=64,
        judged=64,
        max_memory="1GiB",
        kills=(0.5,),
        options=("--formats", "2,4", "--group-size", "32"),
    )
    said: list[str] = []
    run(tmp_path / "results", [(job, True)], tmp_path / "work", said.append)
    (row,) = json.loads((tmp_path / "results" / "scale.json").read_text())["jobs"]
    assert [one["killed"] for one in row["quantize"]["runs"]] == [True, False]
    assert row["undisturbed"]["digest"] == row["quantize"]["digest"]
    assert row["evaluate"]["peak_bytes"] > 1 << 24
    report = (tmp_path / "results" / "scale.md").read_text()
    assert "wrote the same bytes" in report
    assert "killed 1 times" in report


def test_the_report_says_what_is_above_the_limit_and_what_differs():
    run = {"seconds": 90.0, "peak_bytes": 3 << 30, "killed": False}
    job = {
        "model": "A",
        "layers": 3,
        "source_bytes": 1 << 30,
        "max_memory": "2GiB",
        "judged": 64,
        "quantize": {"words": ["quantize", "source"], "runs": [run], "digest": "a"},
        "undisturbed": {"runs": [run], "digest": "b"},
        "forecast": [{"name": "estimate", "memory_bytes": 1 << 30, "seconds": 7200}],
    }
    about = {"versions": {"python": "3"}, "cores": 2, "threads": 2}
    text = markdown({"about": about, "jobs": [job]})
    assert "3 GiB at its peak, above the limit" in text
    assert "OTHER BYTES" in text
    assert "| estimate | 1 GiB | 120 min |" in text


def test_a_digest_names_files_and_what_is_in_them(tmp_path):
    (tmp_path / "a").write_text("1")
    first = digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest(tmp_path) != first


def test_a_command_that_fails_says_why():
    with pytest.raises(BitknapError, match=r"bitknap show: .*nowhere"):
        watched(["show", "nowhere"])


def test_a_command_that_ends_is_not_killed():
    assert killed_after(["--version"], 60.0) is None
