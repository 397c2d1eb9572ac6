"""Finished cells of a comparison: they come back as they were, or are refused."""

import json
import shutil

import numpy as np
import pytest

from bitknap.benchmarks.compare import output
from bitknap.benchmarks.compare.cells import OK, Cell, cells_of
from bitknap.benchmarks.compare.output import writing_into
from bitknap.benchmarks.compare.run import WORK
from bitknap.disk.append_log import open_lines
from bitknap.errors import FileError, MismatchError

CELL = Cell(
    strategy="uniform",
    budget=2.5,
    status=OK,
    values={"bytes": 10, "perplexity": 1 / 3},
    kl=np.array([0.1, 1e-300]),
    ours=np.array([0.2, 3.0]),
    seconds=0.7,
)


def test_a_cell_comes_back_to_the_bit(tmp_path):
    (again,) = cells_of(tmp_path / "journal", [json.dumps(CELL.line()).encode()])
    assert again.line() == CELL.line()
    assert np.array_equal(again.kl, CELL.kl)


@pytest.mark.parametrize(
    "line",
    [
        b'{"strategy": "uniform"}',
        b"[]",
        b"{",
        b"[" * 100_000,
        json.dumps(CELL.line() | {"budget": 3}).encode(),
        json.dumps(CELL.line() | {"kl": [0.1]}).encode(),
    ],
)
def test_a_damaged_cell_is_refused_by_its_line(line, tmp_path):
    lines = [json.dumps(CELL.line()).encode(), line]
    with pytest.raises(FileError, match=r"journal: line 3 is damaged; delete .* to start anew$"):
        list(cells_of(tmp_path / "journal", lines))


def test_a_kill_before_the_folder_has_its_place_leaves_no_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt), writing_into(out, {}, overwrite=False):
            pass
    assert not out.exists()
    assert list(tmp_path.glob(".out.partial")) == []
    with writing_into(out, {}, overwrite=False) as part:
        assert (part / WORK).is_dir()
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stopped_run_of_other_inputs_is_replaced_on_request_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), writing_into(out, {"seed": 0}, overwrite=False) as part:
        open_lines(part / WORK / "journal", {"seed": 0})
        raise KeyboardInterrupt
    before = (part / WORK / "journal").read_bytes()
    with (
        pytest.raises(MismatchError, match=r"another seed; .* or pass `overwrite=True` or delete"),
        writing_into(out, {"seed": 1}, overwrite=False),
    ):
        pass
    assert (part / WORK / "journal").read_bytes() == before
    with writing_into(out, {"seed": 1}, overwrite=True) as part:
        assert not (part / WORK / "journal").exists()


def compared(out, content, *, overwrite):
    with writing_into(out, {}, overwrite=overwrite) as part:
        open_lines(part / WORK / "journal", {})
        (part / "rows.csv").write_text(content)


def killed(*_, **__):
    raise KeyboardInterrupt


def test_a_kill_before_a_new_folder_replaces_the_old_one_loses_no_work(tmp_path, monkeypatch):
    out, aside = tmp_path / "out", tmp_path / ".out.work"
    compared(out, "old", overwrite=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(output, "place", killed)
        compared(out, "new", overwrite=True)
    assert (out / "rows.csv").read_text() == "old"
    assert (aside / "journal").is_file()
    with writing_into(out, {}, overwrite=True) as part:
        assert (part / WORK / "journal").is_file()
        assert (part / "rows.csv").read_text() == "new"
    assert (out / "rows.csv").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_working_files_are_deleted_leaves_a_whole_folder(tmp_path, monkeypatch):
    one, two, aside = tmp_path / "one", tmp_path / "two", tmp_path / ".two.work"
    compared(one, "new", overwrite=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        compared(two, "new", overwrite=False)
    whole = {file.name: file.read_bytes() for file in one.iterdir()}
    assert {file.name: file.read_bytes() for file in two.iterdir()} == whole
    assert aside.is_dir()
    compared(two, "new", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
