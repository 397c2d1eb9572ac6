"""Streaming: bounded pieces, exact places, and the same bytes however often it is stopped."""

import errno
import json
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitknap
from bitknap.allocation import BitPlan, Format, formats
from bitknap.errors import BitknapError, FileError, InputError, MismatchError, ModelError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import pipeline, work_pieces, writer
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.shards import Entry, Shards, lay_out
from bitknap.quantization.packed.work_pieces import sections
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.rounding import Inputs
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks import apply
from bitknap.testing import tiny_model

FILES = bitknap.Packing(max_shard_size="40kB")
GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
PARTIAL = ".out.partial"


def plan_for(source, options=GRIDS):
    units = walk_headers(source.config, source.shapes, ()).units
    choice = np.random.default_rng(0).integers(len(options), size=len(units))
    return BitPlan.from_choice(units, options, choice, model=source.fingerprint)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model in several files, a plan, and what an undisturbed run writes; all read only."""
    root = tmp_path_factory.mktemp("streaming")
    model = tiny_model("mixtral", hidden_size=64, intermediate_size=48)
    model.save_pretrained(root / "model", max_shard_size="100KB")
    source = Checkpoint.open(root / "model")
    plan = plan_for(source, (*GRIDS, Format.keep("fp32")))
    plan.save(root / "plan.json")
    bitknap.quantize(root / "model", plan, root / "out", packing=FILES)
    return SimpleNamespace(
        root=root, folder=root / "model", source=source, plan=plan, whole=contents(root / "out")
    )


def save(case, out, **options):
    return bitknap.quantize(case.folder, case.plan, out, packing=FILES, **options)


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few rows, and a journal line for each at once."""
    monkeypatch.setattr(apply, "PIECE", 4096)
    monkeypatch.setattr(work_pieces, "PIECE", 4096)
    monkeypatch.setattr(work_pieces, "COPY", 4096)
    monkeypatch.setattr(work_pieces, "_CODES", 512)
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 1)


def test_files_are_no_larger_than_asked_and_listed_in_an_index(case):
    index = json.loads(case.whole["bitknap.safetensors.index.json"])
    names = [name for name in case.whole if name.endswith(".safetensors")]
    assert len(names) > 3
    assert sorted(set(index["weight_map"].values())) == names
    assert names[0] == f"bitknap-00001-of-{len(names):05}.safetensors"
    for name in names:
        held = [tensor for tensor, file in index["weight_map"].items() if file == name]
        assert sum(load_file(case.root / "out" / name)[n].nbytes for n in held) <= 40_000 or (
            len(held) == 1
        )


def test_the_files_are_those_of_safetensors(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.arange(5, dtype=torch.uint8),
        "c": torch.arange(4).bfloat16(),
    }
    names = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}
    entries = {n: Entry(names[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    shards = lay_out(entries, "x", 1000)
    shards.create(tmp_path)
    assert shards.are_in(tmp_path)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        for name, tensor in tensors.items():
            file.seek(shards.places[name].start)
            file.write(tensor.view(torch.uint8).numpy().tobytes())
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = (tmp_path / "x.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize(
    "format", (*GRIDS, *formats((1, 3), 8, (False, True), "compact6")), ids=lambda f: f.name
)
def test_sections_are_what_encode_writes(format):
    torch.manual_seed(0)
    quantized = RTN.quantize(torch.randn(1, 24, 40), format)
    stream, (whole, half) = encode(quantized), (sections(format, n, 40) for n in (24, 16))
    assert sum(whole) == len(stream)
    first, rest = encode(quantized.rows(0, 16)), encode(quantized.rows(16, 24))
    parts = zip(first.split(half), rest.split(sections(format, 8, 40)), strict=True)
    assert torch.equal(torch.cat([part for pair in parts for part in pair]), stream)


def test_small_pieces_write_the_same_bytes(case, tmp_path, small):
    said = []
    save(case, tmp_path / "out", progress=lambda *args: said.append(args))
    assert contents(tmp_path / "out") == case.whole
    assert len(said) > 100  # matrices of 12 kB in blocks of rows
    assert said == [("quantize", n, len(said)) for n in range(len(said))]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "switch_transformers", "qwen2_moe"])
def test_matrices_are_read_alone_from_every_layout(family, tmp_path, monkeypatch):
    tiny_model(family).save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    layout = walk_headers(source.config, source.shapes, ("dense", "shared", "attention"))
    for view in layout.views:
        assert torch.equal(source.read_matrix(view), view.of(source.read(view.tensor)))
        part = view.rows(2, 7)
        assert torch.equal(source.read_matrix(part), part.of(source.read(view.tensor)))


def test_what_watches_inputs_gets_matrices_whole(case, tmp_path, small):
    class Watching:
        name, needs_inputs = "watching", True

        def quantize(self, weights, format, inputs=None, exponents=None):
            assert inputs.moments.shape[1] == weights.shape[2]
            shapes.add(tuple(weights.shape[1:]))
            return RTN.quantize(weights, format)

    def inputs(which):
        size = int(case.plan.units.cols[which[0]])
        moments = torch.eye(size).expand(len(which), size, size)
        return Inputs(moments=moments, tokens=torch.ones(len(which)).long())

    shapes: set[tuple[int, ...]] = set()
    writer.save(
        case.source,
        case.plan,
        tmp_path / "out",
        writer.Rounded(rounding=Watching(), inputs=inputs),
        max_shard_size="40kB",
    )
    assert shapes == {(48, 64), (64, 48)}
    assert contents(tmp_path / "out") == case.whole


def stopped_at(count, error):
    def progress(what, done, of):
        if done == count:
            raise error

    return progress


def test_a_stopped_run_goes_on_where_it_was(case, tmp_path, small, monkeypatch):
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt) as stop:
        save(case, out, progress=stopped_at(40, KeyboardInterrupt))
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
    save(case, out, progress=lambda *args: said.append(args))
    assert contents(out) == case.whole
    assert len(made) == len(said) < said[0][2] - 39
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_a_run_stopped_at_the_first_piece_leaves_nothing(case, tmp_path, monkeypatch):
    monkeypatch.setattr(work_pieces.Work, "read", failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="stopped; no piece is kept"):
        save(case, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def failing(error):
    def fail(*args):
        raise error

    return fail


def test_other_inputs_are_refused(case, tmp_path, small):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        save(case, out, progress=stopped_at(40, KeyboardInterrupt))
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
        assert f"of another {'layout, ' if what != 'text' else ''}{what}; give" in message
        assert message.endswith(way_out)
    assert contents(tmp_path / PARTIAL / "files") == before
    bitknap.quantize(case.folder, other, out, resume=bitknap.Resume(overwrite=True))
    assert BitPlan.load(out / PLAN).format_of(0) == GRIDS[0]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_journal_is_left_alone(case, tmp_path):
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "journal.jsonl").write_text("notes\n")
    with pytest.raises(FileError, match=r"not a journal; pass `overwrite=True` or delete"):
        save(case, tmp_path / "out")
    assert (tmp_path / PARTIAL / "journal.jsonl").read_text() == "notes\n"


@pytest.mark.parametrize("damage", ["missing", "short", "header", "lines"])
def test_damaged_files_of_an_unfinished_run_are_made_again(case, tmp_path, small, damage):
    with pytest.raises(KeyboardInterrupt):
        save(case, tmp_path / "out", progress=stopped_at(40, KeyboardInterrupt))
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
    save(case, tmp_path / "out")
    assert contents(tmp_path / "out") == case.whole


def test_bad_weights_keep_what_is_done_and_a_repair_goes_on(case, tmp_path, small):
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


def test_a_full_disk_in_the_middle(case, tmp_path, small, monkeypatch):
    real, calls = os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BitknapError, match=r"out: no space left on the disk; free some; \d+ of"):
        save(case, tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", real)
    save(case, tmp_path / "out")
    assert contents(tmp_path / "out") == case.whole


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EFBIG, "raise 'ulimit -f'")]
)
def test_a_full_disk_before_the_first_piece(number, words, case, tmp_path, monkeypatch):
    def full(shards, folder):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Shards, "create", full)
    with pytest.raises(BitknapError, match=f"out: .*{words}.*; no piece is kept"):
        save(case, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_finished(case, tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: real(handle, data[:1000], at))
    save(case, tmp_path / "out")
    assert contents(tmp_path / "out") == case.whole


def test_no_room_is_said_before_anything_is_done(case, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"out: needs [\d,]+ bytes, the disk has 1,000 free; "):
        save(case, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_is_one_line(case, tmp_path, monkeypatch):
    folder = shutil.copytree(case.folder, tmp_path / "model")
    source = Checkpoint.open(folder)
    assert source.fingerprint == case.plan.model
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(FileError, match="truncated since it was opened"):
        writer.save(source, case.plan, tmp_path / "out")


def test_two_processes_do_not_share_a_folder(case, tmp_path):
    seen = []

    def second(what, done, of):
        with pytest.raises(InputError, match="another process is writing it") as error:
            save(case, tmp_path / "out")
        seen.append(error)

    save(case, tmp_path / "out", progress=second)
    assert seen
    assert contents(tmp_path / "out") == case.whole


@pytest.mark.parametrize("size", [0, -5, "5 apples", "0B"])
def test_sizes_that_make_no_sense(case, tmp_path, size):
    with pytest.raises(InputError):
        bitknap.quantize(
            case.folder, case.plan, tmp_path / "out", packing=bitknap.Packing(max_shard_size=size)
        )
    assert list(tmp_path.iterdir()) == []


# Pieces of a few rows, journalled one by one, so that kills fall between and inside of them.
SMALL = """
from bitknap.quantization.packed import pipeline, work_pieces
from bitknap.quantization.stacks import apply
apply.PIECE = work_pieces.PIECE = work_pieces.COPY = 4096
pipeline.BATCH_BYTES = 1
"""
SLOWED = [("bitknap.quantization.packed.work_pieces.Work.make", 0.005)]


def test_stopped_and_killed_anywhere_it_ends_with_the_same_bytes(case, tmp_path, small, background):
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
    save(case, tmp_path / "out", progress=lambda *args: said.append(args))
    assert said[0][1] >= 10
    assert contents(tmp_path / "out") == case.whole
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_stacks_are_cut_to_bounded_pieces(case):
    units = walk_headers(case.source.config, case.source.shapes, ()).units
    cut = apply.stack_pieces(units, 2 * 4 * 48 * 64)
    assert {len(which) for which in cut} == {2}  # of 4 experts
    assert np.array_equal(np.concatenate(cut), np.concatenate(apply.stacks(units)))
    assert {len(which) for which in apply.stack_pieces(units, 1)} == {1}


def test_weight_only_costs_are_the_same_in_pieces(case, monkeypatch):
    whole = bitknap.estimate(case.folder, DataFree(), GRIDS[:2])
    monkeypatch.setattr("bitknap.estimators.costs.data_free.stack_pieces", singly)
    assert np.allclose(bitknap.estimate(case.folder, DataFree(), GRIDS[:2]).cost, whole.cost)


def singly(units):
    return apply.stack_pieces(units, 1)
