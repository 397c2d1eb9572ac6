"""`estimate` and `quantize --budget` go on after kills, signals and full disks."""

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitknap.cli import main
from bitknap.errors import FileError, InputError
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.readings import Readings, beside, key_of
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.estimators.sweep.text_stream import Streamed
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

TEXT = ("--text", str(Path(__file__).parent.parent.parent / "LICENSE"))  # short: quick to tokenize
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128", *TEXT)


def estimate(model, out, *words):
    main(["estimate", str(model), *FAST, *map(str, words), "-o", str(out)])


class Meter:
    """Counts what is measured after calibration, and stops it after some."""

    def __init__(self, patch):
        self.count, self.stop, self.error = 0, None, KeyboardInterrupt
        real = Replay.kl

        def kl(replay, layer=None, **more):
            # Calibration reads gains with noise; those are repeated, so only readings count.
            if sys._getframe(1).f_code.co_name == "_layers":
                return real(replay, layer, **more)
            if self.count == self.stop:
                raise self.error
            self.count += 1
            return real(replay, layer, **more)

        patch.setattr(Replay, "kl", kl)


@pytest.fixture
def meter(monkeypatch):
    return Meter(monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        ("calibrated,moments,kurtosis", "--check", "3"),
        ("fuzzy,calibrated,moments", "--measurements", "25"),
        ("measured-kl", "--formats", "2", "--group-size", "row"),
    ],
)
def test_stopped_runs_measure_nothing_twice(words, made, tmp_path, meter, capsys):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "t.safetensors"
    words = ("--estimator", *words)
    estimate(made.model, whole, *words)
    total, meter.count = meter.count, 0
    assert total > 10
    meter.stop = total // 2
    with pytest.raises(SystemExit) as exit:
        estimate(made.model, out, *words)
    assert exit.value.code == 130
    line = capsys.readouterr().err
    assert line.startswith("bitknap: stopped; ") and line.count("\n") == 1
    assert line.endswith(
        f" readings are kept in {out}.journal, and the same command goes on from there\n"
    )
    meter.stop = None
    estimate(made.model, out, *words)
    assert meter.count <= total + 4  # of dense profiling a part of 4 units is kept when whole
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["t.safetensors", "whole.safetensors"]


def test_several_texts_share_a_journal(made, tmp_path, meter):
    other = tmp_path / "other.txt"
    other.write_text("What is kept of one text must not be taken for the other. " * 40)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "t.safetensors"
    words = ("--text", other, "--robust", "worst")
    estimate(made.model, whole, *words)
    total, meter.count = meter.count, 0
    meter.stop = total * 2 // 3
    with pytest.raises(SystemExit):
        estimate(made.model, out, *words)
    meter.stop = None
    estimate(made.model, out, *words)
    assert meter.count == total
    assert out.read_bytes() == whole.read_bytes()


# So slow that kills fall between readings and inside of them.
SLOWED = [("bitknap.estimators.measuring.kl_replay.Replay.kl", 0.03)]


def test_killed_and_terminated_quantizing_for_a_budget_ends_with_the_same_bytes(
    made, tmp_path, background
):
    words = ["quantize", made.model, "--budget", "4bpw", *FAST, "--row-blocks", "2", "--permute"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    journal, done = tmp_path / "out.journal", 0
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        process = background([*words, "-o", out], journal, done + 3, slowed=SLOWED)
        time.sleep(0.015)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (status, "")
        assert ("readings are kept" in errors) == (number == signal.SIGTERM), errors
        assert not out.exists()
        done = journal.read_bytes().count(b"\n") - 1
    with journal.open("ab") as file:
        file.write(b'{"key": "to')  # torn
    main([*map(str, words), "-o", str(out)])
    main([*map(str, words), "-o", str(whole)])
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out", "whole"]


def test_a_budget_too_small_loses_no_measurement(made, tmp_path, meter, capsys):
    words = ["quantize", str(made.model), *FAST, "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*words, "--budget", "0.1bpw"])
    assert "readings are kept in" in capsys.readouterr().err
    assert meter.count > 0
    meter.count = 0
    main([*words, "--budget", "4bpw"])
    assert meter.count == 0
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_journal_of_other_inputs_is_refused(made, tmp_path, meter, refused):
    out = tmp_path / "t.safetensors"
    meter.stop = 3
    with pytest.raises(SystemExit):
        estimate(made.model, out)
    meter.stop = None
    journal = tmp_path / "t.safetensors.journal"
    content = journal.read_bytes()
    changed = shutil.copytree(made.model, tmp_path / "model")
    tensors = load_file(changed / "model.safetensors")
    tensors[max(tensors, key=lambda n: tensors[n].numel())][-1, -1] += 1  # beyond a fingerprint
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    ways = {
        "model": (changed, *FAST),
        "text, tokens": (made.model, *FAST, "--tokens", "64"),
        "seed": (made.model, *FAST, "--seed", "1"),
        "method": (made.model, *FAST, "--method", "hqq"),
        "include": (made.model, *FAST, "--include", "attention"),
    }
    for name, words in ways.items():
        line = refused("estimate", *words, "-o", out)
        assert f"the journal belongs to another {name}; give the inputs it was started with" in line
        assert line.endswith(f"or pass --overwrite or delete {journal}")
        assert journal.read_bytes() == content
    estimate(made.model, out, "--tokens", "64", "--overwrite")
    assert not journal.exists()


@pytest.fixture
def layered(made):
    """What says to calibrate layer by layer: less memory than the whole model takes."""
    source = Checkpoint.open(made.model)
    units = walk_headers(source.config, source.shapes, ())
    return ("--max-memory", f"{layer_bytes(source, units, 128, {'moments', 'full'})}B")


# Steps of a pass over layers take a while, so that kills fall inside of them too.
LAYERS = [("bitknap.estimators.sweep.text_stream.Streamed.advance", 0.2)]


@pytest.mark.parametrize("kill", ["first", "later"])
def test_a_killed_calibration_goes_on(kill, made, tmp_path, background, layered, monkeypatch):
    words = ["estimate", str(made.model), *FAST, "--estimator", "moments", *layered]
    whole, out = tmp_path / "whole.safetensors", tmp_path / "t.safetensors"
    main([*words, "-o", str(whole)])
    journal = tmp_path / "t.safetensors.journal"
    lines = {"first": 1, "later": 4}[kill]
    process = background([*words, "-o", out], journal, lines, slowed=LAYERS)
    time.sleep(0.1)
    process.kill()
    process.wait()
    assert not out.exists()
    passed, real = [], Streamed.advance

    def counted(*args):
        passed.append(args)
        return real(*args)

    monkeypatch.setattr(Streamed, "advance", counted)
    with pytest.raises(SystemExit):
        main([*words, "-o", str(out), "--seed", "1"])  # a journal of other inputs
    assert not passed
    main([*words, "-o", str(out)])
    # Two layers: each is recorded, run unchanged and with noise, and the first noise passes both,
    # and so does that of roundings.
    assert 0 < len(passed) <= 9 - lines
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["t.safetensors", "whole.safetensors"]


def test_gptq_goes_on_from_what_estimating_calibrated(made, tmp_path, layered, monkeypatch):
    words = ["quantize", str(made.model), "--budget", "4bpw", *FAST, "--method", "gptq"]
    words += ["--estimator", "moments", *layered]
    passed, real = [], Streamed.advance

    def counted(*args):
        passed.append(args)
        return real(*args)

    monkeypatch.setattr(Streamed, "advance", counted)
    main([*words, "-o", str(tmp_path / "out")])
    assert len(passed) == 9  # and not twice
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_stopped_calibration_says_what_is_kept(made, tmp_path, layered, monkeypatch, capsys):
    words = ["estimate", str(made.model), *FAST, "--estimator", "moments", *layered]
    out, real, left = tmp_path / "t.safetensors", Streamed.advance, [3]

    def stopped(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Streamed, "advance", stopped)
    with pytest.raises(SystemExit) as exit:
        main([*words, "-o", str(out)])
    assert exit.value.code == 130
    line = f"stopped; 3 readings are kept in {out}.journal, and the same command goes on from there"
    assert line in capsys.readouterr().err
    main([*words[:-2], "-o", str(out), "--overwrite", "--seed", "3"])  # needs no journal at all
    assert sorted(x.name for x in tmp_path.iterdir()) == ["t.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some notes\n", "not a journal; move"),
        (b"", "not a journal; pass --overwrite or delete"),
        (None, "line 2 is damaged; cut the file before it"),
    ],
)
def test_what_is_no_journal_is_kept(content, message, made, tmp_path, meter, refused):
    out, journal = tmp_path / "t.safetensors", tmp_path / "t.safetensors.journal"
    if content is None:
        meter.stop = 3
        with pytest.raises(SystemExit):
            estimate(made.model, out)
        meter.stop = None
        first, _, *rest = journal.read_bytes().splitlines()
        content = b"\n".join([first, b'{"key": 3}', *rest]) + b"\n"
    journal.write_bytes(content)
    assert message in refused("estimate", made.model, *FAST, "-o", out)
    assert journal.read_bytes() == content
    if content == b"some notes\n":
        assert message in refused("estimate", made.model, *FAST, "-o", out, "--overwrite")
        assert journal.read_bytes() == content
        return
    estimate(made.model, out, "--overwrite")
    assert out.read_bytes() == made.table.read_bytes()


def test_a_full_disk_is_said_and_nothing_is_lost(made, tmp_path, monkeypatch, meter, capsys):
    out, calls, real = tmp_path / "t.safetensors", [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as exit:
        estimate(made.model, out)
    line = capsys.readouterr().err
    assert exit.value.code == 2
    assert f"{out}.journal: no space left on the disk; free some; " in line
    assert line.count("\n") == 1
    monkeypatch.setattr(os, "fsync", real)
    estimate(made.model, out)
    assert out.read_bytes() == made.table.read_bytes()


def test_two_processes_do_not_share_a_journal(tmp_path):
    path = tmp_path / "t.journal"
    with beside(path, {"model": "a"}) as readings:
        readings.keep("one", 0.5)
        with (
            pytest.raises(InputError, match="another process is measuring; wait"),
            beside(path, {"model": "a"}),
        ):
            raise AssertionError
    with beside(path, {"model": "a"}) as readings:
        assert readings.known("one") == [0.5]
        with pytest.raises(FileError, match="line 2 is damaged"):
            readings.known("one", size=2)


def test_journals_without_readings_go_and_no_journal_remembers_nothing(tmp_path):
    path = tmp_path / "new" / "t.journal"
    with beside(path, {"model": "a"}):
        assert path.exists()
    assert not path.exists()
    nowhere = Readings()
    nowhere.keep("one", 0.1)
    assert nowhere.known("one") is None
    with beside(None, {}) as readings:
        readings.keep("one", float("nan"))
    assert readings.known("one") is None
    names = {key_of([1, 2], []), key_of([2, 1], []), key_of([1, 2, 0], [])}
    assert len(names) == 3
