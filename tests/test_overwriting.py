"""Every command that writes: what it refuses to replace, to the byte, and what it takes again."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitknap.cli import main
from bitknap.disk.atomic import beside

FAST = ("--formats", "2,4", "--group-size", "8,row", "--estimator", "data-free")
LONG = "n" * 230
FILES: dict[str, Any] = {}
FOLDERS: dict[str, Any] = {}


def writes(kind):
    """Register a command: its words but for `-o OUT`, and the inputs among them."""

    def add(make):
        (FILES if kind == "file" else FOLDERS)[make.__name__] = make
        return make

    return add


@writes("file")
def estimate(made):
    return ["estimate", made.model, *FAST, "-o"], [made.model]


@writes("file")
def solve(made):
    return ["solve", made.table, "--budget", "4bpw", "-o"], [made.table]


@writes("file")
def solve_frontier(made):
    return ["solve", made.table, "--frontier", "-o"], [made.table]


@writes("file")
def show_picture(made):
    return ["show", made.table, "--picture"], [made.table]


@writes("file")
def study_show(made):
    return ["study", "show", "s", "--storage", made.storage, "-o"], [made.study]


@writes("file")
def study_best(made):
    return ["study", "best", "s", "--storage", made.storage, "-o"], [made.study]


@writes("file")
def quantize_report(made):
    out = made.root / "reported"
    words = ["quantize", made.model, "--plan", made.plan, "--overwrite", "-o", out, "--report"]
    return words, [made.model, made.plan, out]


@writes("folder")
def quantize_plan(made):
    return ["quantize", made.model, "--plan", made.plan, "-o"], [made.model, made.plan]


@writes("folder")
def quantize_budget(made):
    return ["quantize", made.model, "--budget", "4bpw", *FAST, "-o"], [made.model]


@writes("folder")
def export(made):
    words = ["export", made.plan, "--model", made.model, "--to", "vllm", "-o"]
    return words, [made.plan, made.model]


@writes("folder")
def convert(made):
    return ["convert", made.out, "--layout", "tiles", "-o"], [made.out]


COMMANDS = [*FILES.items(), *FOLDERS.items()]
named = pytest.mark.parametrize("make", [m for _, m in COMMANDS], ids=[n for n, _ in COMMANDS])


@pytest.fixture(scope="module")
def ready(made):
    """What commands read, with a study of one trial beside it."""
    made.study = made.root / "study.log"
    made.storage = f"journal:{made.study}"
    words = ["--table", str(made.table), "--budget", "4bpw"]
    main(["study", "create", "s", "--storage", made.storage, *words])
    words = ["--model", str(made.model), "--trials", "1", "--tokens", "64"]
    main(["study", "run", "s", "--storage", made.storage, *words])
    return made


def suffix(make):
    ends = {"estimate": ".safetensors", "show_picture": ".svg"}
    ends |= {"study_show": ".html", "quantize_report": ".html"}
    return "" if make.__name__ in FOLDERS else ends.get(make.__name__, ".json")


def tree(folder):
    return {str(f): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


@pytest.mark.slow
@named
def test_it_writes_over_its_own_and_over_nothing_else(make, ready, refused, tmp_path):
    words, inputs = make(ready)
    words = [str(word) for word in words]
    out = tmp_path / f"my {LONG}{suffix(make)}"
    main([*words, str(out)])
    before = tree(tmp_path)
    if "--overwrite" not in words:
        assert "exists; choose another name or pass --overwrite" in refused(*words, out)
    main([*words, str(out), "--overwrite"])
    assert tree(tmp_path) == before
    if make.__name__ in FOLDERS:
        (out / "thesis.txt").write_text("years of work")
        assert "thesis.txt" in refused(*words, out, "--overwrite")
        assert tree(tmp_path) == before | {str(out / "thesis.txt"): b"years of work"}
        return
    out.write_text("years of work")
    assert "was not written by Bitknap" in refused(*words, out, "--overwrite")
    assert out.read_text() == "years of work"
    out.write_text('{"format": "another tool\'s"}')
    assert "was not written by Bitknap" in refused(*words, out, "--overwrite")
    assert inputs


@pytest.mark.slow
@named
def test_no_output_is_an_input(make, ready, refused, tmp_path):
    words, inputs = make(ready)
    before = tree(ready.root)
    link = tmp_path / "link"
    link.symlink_to(inputs[0])
    outs = [*inputs, ready.root / "x" / ".." / inputs[0].name, link]
    if inputs[0].is_dir():
        outs += [inputs[0] / f"new{suffix(make)}", inputs[0] / "deep" / "er"]
    else:
        os.link(inputs[0], tmp_path / f"hard{suffix(make)}")
        outs.append(tmp_path / f"hard{suffix(make)}")
    for out in outs:
        assert "may not overlap" in refused(*words, out, "--overwrite"), out
    for out in (ready.root, ready.root / "..", "/"):
        refused(*words, out, "--overwrite")
    assert tree(ready.root) == before


@named
def test_places_that_cannot_be_written_are_said_before_any_work(make, ready, refused, tmp_path):
    words, _ = make(ready)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    end = suffix(make)
    shutil.copytree(ready.out, tmp_path / "folder")
    for out, said in (
        (tmp_path / "dangling", "is a link to"),
        (tmp_path / "file" / f"out{end}", "is a file, not a folder"),
        (tmp_path / f"{'x' * 260}{end}", "choose a shorter name"),
        (f"~/out{end}", "only a shell replaces ~ by your home folder"),
        (tmp_path / "  ", "the name is blank"),
        (tmp_path / ("folder" if end else "file"), "choose another name"),
    ):
        assert said in refused(*words, out, "--overwrite")


@pytest.mark.slow
@named
@pytest.mark.parametrize("name", ["-dash", "two\nlines", "häß \udcff"])
def test_names_of_all_kinds(make, name, ready, tmp_path, monkeypatch, capsys):
    words, _ = make(ready)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main([*map(str, words), f"{name}{suffix(make)}", "--overwrite"])
    found = sorted(path.name for path in tmp_path.iterdir())
    assert f"{name}{suffix(make)}" in found
    assert len(found) == (2 if make is solve_frontier else 1)
    assert capsys.readouterr().err == ""


def test_a_page_is_not_written_into_the_checkpoint(ready, refused, tmp_path):
    out = tmp_path / "out"
    words = ("quantize", ready.model, "--plan", ready.plan, "-o", out, "--report")
    for page in (out, out / "report.html", tmp_path):
        assert "may not overlap" in refused(*words, page)


def test_outputs_are_not_other_files_that_a_command_writes(ready, refused, tmp_path):
    words = ("estimate", ready.model, *FAST)
    for option in ("--journal", "--samples"):
        assert "may not overlap" in refused(*words, option, tmp_path / "x", "-o", tmp_path / "x")


def test_a_working_folder_of_somebody_else_is_left_alone(ready, refused, tmp_path):
    out = tmp_path / "out"
    partial = beside(out, "partial")
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    words = ("quantize", ready.model, "--plan", ready.plan, "-o", out, "--overwrite")
    assert "in the way and was not written by Bitknap" in refused(*words)


def test_notes_beside_a_table_stay(ready, tmp_path):
    out = tmp_path / "t.safetensors"
    notes = tmp_path / "t.safetensors.journal"
    notes.write_text("my notes")
    main(["estimate", str(ready.model), *FAST, "-o", str(out)])
    assert notes.read_text() == "my notes"


def test_a_checkpoint_of_an_earlier_version_is_known(ready, refused, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(ready.out, out)
    (out / "bitknap_files.json").unlink()
    words = [*map(str, ("quantize", ready.model, "--plan", ready.plan, "-o", out)), "--overwrite"]
    (out / "notes.md").write_text("mine")
    assert "notes.md was not written by Bitknap" in refused(*words)
    (out / "notes.md").unlink()
    main(words)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in ready.out.iterdir()
    }
