"""Finished cells of a comparison: they come back as they were, or are refused."""

import json

import numpy as np
import pytest

from bitknap.benchmarks.compare.output import writing_into
from bitknap.benchmarks.compare.run import OK, WORK, Cell, _cells
from bitknap.errors import FileError

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
    (again,) = _cells(tmp_path / "journal", [json.dumps(CELL.line()).encode()])
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
        list(_cells(tmp_path / "journal", lines))


def test_a_kill_before_the_folder_has_its_place_leaves_no_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt), writing_into(out, {}, overwrite=False):
            pass
    assert not out.exists()
    with writing_into(out, {}, overwrite=False) as part:
        assert part == out
        assert (out / WORK).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
