"""Runs that were stopped, killed or refused half-way: what they keep, and how they go on."""

import errno
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan, formats
from bitknap.errors import BitknapError, FileError, InputError, MismatchError, ModelError
from bitknap.quantization.packed import work_pieces, writer
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.packed.shards import Shards
from bitknap.quantization.source.checkpoint import Checkpoint

FILES = bitknap.Packing(max_shard_size="40kB")
GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
PARTIAL = ".out.partial"


def stopped_at(count, error):
    def progress(what, done, of):
        if done == count:
            raise error

    return progress


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(case, tmp_path, small, monkeypatch, contents):
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt) as stop:
        case.save(out, progress=stopped_at(40, KeyboardInterrupt))
    partial = out.parent / PARTIAL
    assert str(stop.value).startswith("stopped; 4")
    assert str(stop.value).endswith(f"kept in {partial}, and the same command goes on from there")
    assert not out.exists()
    journal = partial / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"piece": 7')  # torn by a kill
    made, real = [], work_pieces.Work.make

    def make(work, piece, given):
        made.append(piece)
        return real(work, piece, given)

    monkeypatch.setattr(work_pieces.Work, "make", make)
    said = []
    case.save(out, progress=lambda *args: said.append(args))
    assert contents(out) == case.whole
    assert len(made) == len(said) < said[0][2] - 39
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_a_run_stopped_at_the_first_piece_leaves_nothing(case, tmp_path, monkeypatch):
    monkeypatch.setattr(work_pieces.Work, "read", failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="stopped; no piece is kept"):
        case.save(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def failing(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.slow
def test_other_inputs_are_refused(case, tmp_path, small, contents):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        case.save(out, progress=stopped_at(40, KeyboardInterrupt))
    before = contents(tmp_path / PARTIAL / "files")
    units = case.plan.units
    other = BitPlan.uniform(units, GRIDS[0], case.plan.model)
    way_out = f"pass `overwrite=True` or delete {tmp_path / PARTIAL}"
    refusals: tuple[tuple[BitPlan, dict[str, Any], str], ...] = (
        (case.plan, {}, "max_shard_size"),
        (other, {"max_shard_size": "40kB"}, "plan"),
        (
            case.plan,
            {"max_shard_size": "40kB", "rounded": writer.Rounded(about={"text": "x"})},
            "text",
        ),
    )
    for plan, options, what in refusals:
        with pytest.raises(MismatchError) as error:
            writer.save(case.source, plan, out, **options)
        message = str(error.value)
        assert f"to another {'layout, ' if what != 'text' else ''}{what}; give" in message
        assert message.endswith(way_out)
    assert contents(tmp_path / PARTIAL / "files") == before
    bitknap.quantize(case.folder, other, out, resume=bitknap.Resume(overwrite=True))
    assert BitPlan.load(out / PLAN).format_of(0) == GRIDS[0]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_journal_is_left_alone(case, tmp_path):
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "journal.jsonl").write_text("notes\n")
    with pytest.raises(FileError, match=r"not a journal; pass `overwrite=True` or delete"):
        case.save(tmp_path / "out")
    assert (tmp_path / PARTIAL / "journal.jsonl").read_text() == "notes\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["journal.jsonl", "files", "files/*.safetensors"])
def test_nothing_is_written_through_a_link(case, tmp_path, small, name, contents):
    with pytest.raises(KeyboardInterrupt):
        case.save(tmp_path / "out", progress=stopped_at(40, KeyboardInterrupt))
    file = sorted((tmp_path / PARTIAL).glob(name))[0]
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    before = contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    if name.startswith("files/"):
        case.save(tmp_path / "out")
        assert contents(tmp_path / "out") == case.whole
    else:
        with pytest.raises(InputError, match="in the way and was not written by Bitknap"):
            case.save(tmp_path / "out")
    assert (contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "short", "header", "lines"])
def test_damaged_files_of_an_unfinished_run_are_made_again(case, tmp_path, small, damage, contents):
    with pytest.raises(KeyboardInterrupt):
        case.save(tmp_path / "out", progress=stopped_at(40, KeyboardInterrupt))
    file = sorted((tmp_path / PARTIAL / "files").glob("*.safetensors"))[0]
    journal = tmp_path / PARTIAL / "journal.jsonl"
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "header":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    else:
        head = journal.read_text().splitlines()[0]
        journal.write_text(f'{head}\nnoise\n{{"piece": 9999}}\n[]\n{{"piece": "a"}}\n')
    case.save(tmp_path / "out")
    assert contents(tmp_path / "out") == case.whole


@pytest.mark.slow
def test_bad_weights_keep_what_is_done_and_a_repair_goes_on(case, tmp_path, small, contents):
    folder = shutil.copytree(case.folder, tmp_path / "model")
    last = sorted(folder.glob("*.safetensors"))[-1]
    good, stat = last.read_bytes(), last.stat()
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[-1] = float("nan")
    save_file(tensors, last, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or infinite weight.*; \d+ of \d+ pieces are kept"):
        bitknap.quantize(folder, case.plan, tmp_path / "out", packing=FILES)
    last.write_bytes(good)
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    said = []

    def tell(*args):
        said.append(args)

    bitknap.quantize(folder, case.plan, tmp_path / "out", packing=FILES, progress=tell)
    assert said[0][1] > 0
    assert contents(tmp_path / "out") == case.whole


@pytest.mark.slow
def test_a_full_disk_in_the_middle(case, tmp_path, small, monkeypatch, contents):
    real, calls = os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BitknapError, match=r"out: no space left on the disk; free some; \d+ of"):
        case.save(tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", real)
    case.save(tmp_path / "out")
    assert contents(tmp_path / "out") == case.whole


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EFBIG, "raise 'ulimit -f'")]
)
def test_a_full_disk_before_the_first_piece(number, words, case, tmp_path, monkeypatch):
    def full(shards, folder):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Shards, "create", full)
    with pytest.raises(BitknapError, match=f"out: .*{words}.*; no piece is kept"):
        case.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_anything_is_done(case, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"out: needs [\d,]+ bytes, the disk has 1,000 free; "):
        case.save(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_is_one_line(case, tmp_path, monkeypatch):
    folder = shutil.copytree(case.folder, tmp_path / "model")
    source = Checkpoint.open(folder)
    assert source.fingerprint == case.plan.model
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(FileError, match="truncated since it was opened"):
        writer.save(source, case.plan, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_do_not_share_a_folder(case, tmp_path, contents):
    seen = []

    def second(what, done, of):
        with pytest.raises(InputError, match="another process is writing it") as error:
            case.save(tmp_path / "out")
        seen.append(error)

    case.save(tmp_path / "out", progress=second)
    assert seen
    assert contents(tmp_path / "out") == case.whole


# Pieces of a few rows, journalled one by one, so that kills fall between and inside of them.
SMALL = """
from bitknap.quantization.packed import pipeline, work_pieces
from bitknap.quantization.stacks import grouping
grouping.PIECE = work_pieces.PIECE = work_pieces.COPY = 4096
pipeline.BATCH_BYTES = 1
"""
SLOWED = [("bitknap.quantization.packed.work_pieces.Work.make", 0.005)]


@pytest.mark.slow
def test_stopped_and_killed_anywhere_it_ends_with_the_same_bytes(
    case, tmp_path, small, background, contents
):
    random.seed(0)
    journal, done = tmp_path / PARTIAL / "journal.jsonl", 0
    ways = (
        (signal.SIGTERM, 143, "bitknap: stopped; "),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    )
    for number, status, words in ways:
        command = ["quantize", case.folder, "--plan", case.root / "plan.json"]
        command += ["-o", tmp_path / "out", "--max-shard-size", "40kB"]
        lines = done + random.randrange(5, 40)
        process = background(command, journal, lines, slowed=SLOWED, setup=SMALL)
        time.sleep(random.random() * 0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (status, "")
        assert errors.startswith(words)
        assert errors.count("\n") == (1 if words else 0)
        assert bool(words) == ("and the same command goes on from there" in errors)
        assert not (tmp_path / "out").exists()
        done = journal.read_bytes().count(b"\n")
    said = []
    case.save(tmp_path / "out", progress=lambda *args: said.append(args))
    assert said[0][1] >= 10
    assert contents(tmp_path / "out") == case.whole
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
