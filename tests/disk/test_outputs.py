"""Outputs take the place of nothing but what this tool wrote, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bitknap
from bitknap.disk import outputs
from bitknap.disk.atomic import beside, write_whole
from bitknap.disk.manifest import MANIFEST, is_ours
from bitknap.disk.outputs import check_output, place, whole_folder, writing
from bitknap.errors import InputError

NAME = "n" * 240


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def written(path, content="old", overwrite=False):
    with whole_folder(path, overwrite=overwrite) as part:
        (part / "inner").mkdir()
        (part / "inner" / "a").write_text(content)
        (part / "b").write_text(content)
    return path


def message(path, kind="folder", *, overwrite=True, inputs=()):
    with pytest.raises(InputError) as error:
        check_output(path, kind, overwrite=overwrite, inputs=inputs)
    assert "\n" not in str(error.value).replace(str(path), "")
    return str(error.value)


# --- Folders appear at the end -------------------------------------------------------------------
def test_a_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out, overwrite=False) as part:
        (part / "x").write_text("x")
        assert not out.exists()
        assert part.parent == out.parent  # a rename never crosses file systems
    assert names(out) == [MANIFEST, "x"]
    assert names(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_folder_leaves_nothing_new(tmp_path, error, existing):
    out = tmp_path / "out"
    before = tree(written(out)) if existing else {}
    with pytest.raises(error), whole_folder(out, overwrite=True) as part:
        (part / "x").write_text("x")
        raise error
    assert names(tmp_path) == (["out"] if existing else [])
    assert not existing or tree(out) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_folders_that_were_made_above_go_again(tmp_path, error):
    (tmp_path / "mine").mkdir()
    with (
        pytest.raises(error),
        whole_folder(tmp_path / "mine" / "a" / "b" / "out", overwrite=False) as part,
    ):
        (part / "x").write_text("x")
        raise error
    assert names(tmp_path / "mine") == []
    with pytest.raises(error), whole_folder(tmp_path / "a" / "out", overwrite=False):
        (tmp_path / "a" / "somebody's").write_text("keep me")
        raise error
    assert names(tmp_path / "a") == ["somebody's"]


def test_an_existing_folder_or_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    assert "exists; choose another name or pass `overwrite=True`" in message(
        tmp_path / "folder", overwrite=False
    )
    for overwrite in (False, True):
        said = message(tmp_path / "file", overwrite=overwrite)
        assert "file is a file, but the output is a folder" in said
        said = message(tmp_path / "folder", "file", overwrite=overwrite)
        assert "folder is a folder, but the output is a file" in said
    assert names(tmp_path) == ["file", "folder"]


def test_the_list_is_of_all_other_files_and_repeats(tmp_path):
    folder = written(tmp_path / "out")
    first = (folder / MANIFEST).read_bytes()
    assert json.loads(first) == {
        "format": "bitknap.files",
        "version": "1.0",
        "files": ["b", "inner/a"],
    }
    assert (written(folder, "new", overwrite=True) / MANIFEST).read_bytes() == first
    assert tree(folder)["inner/a"] == b"new"
    assert names(tmp_path) == ["out"]


# --- Only what this tool wrote is replaced -------------------------------------------------------
@pytest.mark.parametrize("where", ["thesis.txt", "inner/thesis.txt", "deep/er/thesis.txt"])
def test_a_strange_file_stops_the_run_and_is_named(tmp_path, where):
    folder = written(tmp_path / "out")
    (folder / where).parent.mkdir(parents=True, exist_ok=True)
    (folder / where).write_text("years of work")
    before = tree(folder)
    assert f"{where} was not written by Bitknap" in message(folder)
    with pytest.raises(InputError, match="thesis"), whole_folder(folder, overwrite=True):
        raise AssertionError("never entered")
    assert tree(folder) == before


def test_a_file_that_came_while_the_new_folder_was_made_stays(tmp_path):
    folder = written(tmp_path / "out")
    with (
        pytest.raises(InputError, match=r"thesis\.txt was not written by Bitknap"),
        whole_folder(folder, overwrite=True),
    ):
        (folder / "thesis.txt").write_text("years of work")
    assert tree(folder)["thesis.txt"] == b"years of work"
    assert tree(folder)["b"] == b"old"


def test_a_list_does_not_speak_for_links(tmp_path):
    folder = written(tmp_path / "out")
    (folder / "b").unlink()
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    assert "b was not written by Bitknap" in message(folder)
    shutil.rmtree(folder / "inner")
    (folder / "b").unlink()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("x")
    (folder / "inner").symlink_to(tmp_path / "precious")
    assert "inner was not written by Bitknap" in message(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": "bitknap.files"}', b"\xff"])
def test_a_damaged_list_speaks_for_nothing(tmp_path, content):
    folder = written(tmp_path / "out")
    (folder / MANIFEST).write_bytes(content)
    assert "was not written by Bitknap" in message(folder)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    written(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (b"", True),
        (b'{"format": "bitknap.plan", "version": "1.0"}', True),
        (b'{\n "a": 1,\n "format": "bitknap.plan"\n}\n', True),
        (b'{"format": "bitknap.journal"}\n{"key": 1}\n{"torn', True),
        (b'<!doctype html><meta name="generator" content="Bitknap">', True),
        (b"<svg><dc:title>Bitknap</dc:title></svg>", True),
        (b'{"notes": "on the format bitknap.plan"}', False),
        (b'{"format": "other"}', False),
        (b'{"format": 5}', False),
        (b"<html>bitknap</html>", False),
        (b"# notes on bitknap.plan\n", False),
        (b"\x10\0\0\0\0\0\0\0{}", False),
        (b"[" * 100_000, False),
        (b"{" * 100_000, False),
    ],
)
def test_files_say_whose_they_are(tmp_path, content, ours):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert is_ours(path) is ours
    if ours:
        check_output(path, "file", overwrite=True)
    else:
        assert "file was not written by Bitknap" in message(path, "file")


# --- Outputs are apart from inputs ---------------------------------------------------------------
@pytest.mark.parametrize("spelling", ["src", "src/", "link", "src/../src", "./src"])
def test_an_output_is_no_input_in_any_spelling(tmp_path, monkeypatch, spelling):
    source = tmp_path / "src"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for out in (Path(spelling), tmp_path / spelling):
        assert "may not overlap" in message(out, inputs=[source])
        assert "may not overlap" in message(out, inputs=[Path("link")])
        assert "lies in" in message(out / "x" / "y", inputs=[source])
        assert "contains" in message(out, inputs=[source / "a" / "b"])
    assert "contains" in message(source / "..", inputs=[source])
    check_output(tmp_path / "src2", "folder", overwrite=False, inputs=[source])


def test_files_of_an_input_that_are_elsewhere_are_inputs(tmp_path):
    source, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for folder in (source, blobs):
        folder.mkdir()
    (blobs / "weights").write_text("x")
    (source / "model.safetensors").symlink_to(blobs / "weights")
    for out in (blobs, blobs / "weights"):
        assert "contains" in message(out, inputs=[source])
    os.link(blobs / "weights", tmp_path / "hard")
    assert "may not overlap" in message(tmp_path / "hard", "file", inputs=[source])


@pytest.mark.parametrize("at", [".", "", "..", "/", "src"])
def test_the_folder_that_a_command_runs_in_is_not_replaced(tmp_path, monkeypatch, at):
    (tmp_path / "home" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "src")
    path = tmp_path / "home" / "src" if at == "src" else Path(at)
    message(path)
    assert (tmp_path / "home" / "src").exists()


# --- Before any work -----------------------------------------------------------------------------
def test_links_are_refused(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(written(tmp_path / "out"))
    for kind in ("file", "folder"):
        assert f"is a link to {tmp_path / 'nowhere'}" in message(tmp_path / "dangling", kind)
        assert f"name the {kind} itself" in message(tmp_path / "link", kind)
        said = message(tmp_path / "dangling" / "x", kind)
        assert "is a broken link" in said


def test_places_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in message(tmp_path / "file" / "out")
    assert "the name has 256 bytes, the file system takes 255" in message(tmp_path / ("ä" * 128))
    assert "is a device" in message(Path("/dev/null"), "file")
    assert "is a mount point" in message(Path("/proc"))
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert "may not be written to" in message(tmp_path / "out")


def test_long_names_work(tmp_path):
    out = written(tmp_path / NAME)
    assert names(written(out, "new", overwrite=True)) == ["b", MANIFEST, "inner"]
    write_whole(tmp_path / ("f" * 255), b"x")
    write_whole(tmp_path / ("ä" * 127), b"x")
    found = {beside(tmp_path / (NAME + end), "partial") for end in "ab"}
    assert len(found) == 2
    assert all(len(path.name) < 255 for path in found)
    assert beside(Path("a/out"), "partial") == Path("a/.out.partial").absolute()


@pytest.mark.parametrize("name", ["with space", "two\nlines", "häß", "-o", "\udcff", "a:b*?"])
def test_any_name_works(tmp_path, name):
    for _ in range(2):
        assert tree(written(tmp_path / name, overwrite=True))["b"] == b"old"
        write_whole(tmp_path / f"{name}.json", b'{"format": "bitknap.plan"}')
    assert len(names(tmp_path)) == 2


# --- Kills ---------------------------------------------------------------------------------------
def killed_at(step, out, *, exchanges):
    """Replace `out` in a process that dies before the given step; return whether there was one."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [step]

    def counted(real):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for owner, name in (
        *((Path, name) for name in ("rename", "replace", "unlink", "rmdir", "mkdir")),
        (os, "open"),
        (outputs, "_exchange"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    if not exchanges:
        outputs._exchange = lambda *args: False
    try:
        written(out, "new", overwrite=True)
    finally:
        os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("former", [True, False])
def test_killed_at_any_step_the_old_or_the_new_one_is_there(
    tmp_path, monkeypatch, exchanges, former
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of them
    seen, step, ended = set(), 0, True
    while ended:
        out = tmp_path / str(step) / "out"
        written(out)
        if former:  # of a version that wrote no list
            (out / MANIFEST).unlink()
            (out / "bitknap_plan.json").write_text('{"format": "bitknap.plan"}')
            (out / "config.json").write_text('{"quantization_config": {"quant_method": "bitknap"}}')
            (out / "b").rename(out / "README.md")
            shutil.rmtree(out / "inner")
        ended = killed_at(step, out, exchanges=exchanges)
        folder = out if out.exists() else beside(out, "old")
        found = tree(folder)
        found = {name: found[name] for name in found if MANIFEST not in name}
        seen.add("old" if b"old" in found.values() else "new")
        assert out.exists() or not exchanges
        assert len(found) == (3 if former and b"old" in found.values() else 2)
        assert not {b"old", b"new"} <= set(found.values())
        written(out, "again", overwrite=True)
        assert names(out.parent) == ["out"]
        assert tree(out)["b"] == b"again"
        step += 1
    assert seen == {"old", "new"}
    assert step > 20


def test_what_a_killed_writer_left_goes(tmp_path):
    path = tmp_path / "plan.json"
    stale = tmp_path / ".plan.json.tmp-abcdefgh"
    stale.write_text("half")
    (tmp_path / ".plan.json.tmp-notes").write_text("mine")
    write_whole(path, b"{}")
    assert names(tmp_path) == [".plan.json.tmp-notes", "plan.json"]


def test_hidden_names_that_somebody_else_took_are_left_alone(tmp_path):
    for suffix in ("new", "old"):
        taken = tmp_path / suffix / f".out.{suffix}"
        taken.mkdir(parents=True)
        (taken / "thesis.txt").write_text("years of work")
        with pytest.raises(InputError, match="in the way and was not written by Bitknap"):
            written(tmp_path / suffix / "out")
        assert tree(taken) == {"thesis.txt": b"years of work"}
    (tmp_path / ".out.lock").write_text("mine")
    with pytest.raises(InputError, match="in the way"):
        written(tmp_path / "out")
    assert (tmp_path / ".out.lock").read_text() == "mine"


# --- Two at once ---------------------------------------------------------------------------------
HOLD = """
import sys
from pathlib import Path
from bitknap.disk.outputs import writing
with writing(Path(sys.argv[1])):
    print("holds it", flush=True)
    sys.stdin.read()
"""


def test_the_second_of_two_processes_is_refused_until_the_first_is_killed(tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(bitknap.__file__).parent.parent)}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"holds it\n"
    with pytest.raises(InputError, match="out: another process is writing it; wait for that one"):
        written(out)
    assert not out.exists()
    first.kill()
    first.communicate()
    written(out)
    assert names(tmp_path) == ["out"]


def test_one_process_may_enter_twice(tmp_path):
    with writing(tmp_path / "out"), writing(tmp_path / "out"):
        written(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_placing_a_folder_where_one_came_meanwhile(tmp_path):
    part = written(tmp_path / "part", "new")
    out = written(tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        place(part, out, overwrite=False)
    assert tree(out)["b"] == b"old"
    assert tree(part)["b"] == b"new"
