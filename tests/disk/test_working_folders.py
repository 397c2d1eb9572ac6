"""Hidden working folders: known as ours while they are deleted, and strange files in them stay."""

from pathlib import Path

import pytest

from bitknap.disk import outputs
from bitknap.disk.append_log import append_lines, open_lines
from bitknap.disk.outputs import check_output, whole_folder
from bitknap.errors import FileError, InputError


def working_folder(tmp_path):
    """Return a hidden folder with a listed one in it, as a sorted copy of a model is kept."""
    folder = tmp_path / ".out.copy"
    with whole_folder(folder / "sorted", overwrite=False) as part:
        for name in ("config.json", "model.safetensors", "a.txt"):
            (part / name).write_text(name)
    (folder / "sorted.json").write_text("the copy is whole")
    return folder


def test_a_working_folder_that_is_being_deleted_is_known_at_every_step(tmp_path, monkeypatch):
    count = 0
    while True:
        folder = working_folder(tmp_path)
        left, real = count, Path.unlink

        def unlink(self, missing_ok=False, real=real):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            real(self, missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            try:
                outputs.drop(folder, r"sorted(\.json)?")
            except KeyboardInterrupt:
                check_output(folder / "sorted", "folder", overwrite=True)
                whole = (folder / "sorted" / "config.json").exists()
                assert whole or not (folder / "sorted.json").exists()
        outputs.drop(folder, r"sorted(\.json)?")
        assert not folder.exists()
        if left >= 0:
            break
        count += 1
    assert count == 5  # what says that it is whole, three files, and their list


def test_a_strange_file_in_a_working_folder_stays(tmp_path):
    folder = working_folder(tmp_path)
    (folder / "sorted" / "thesis.txt").write_text("years of work")
    outputs.drop(folder, r"sorted(\.json)?")
    assert (folder / "sorted" / "thesis.txt").read_text() == "years of work"


def test_a_file_that_safetensors_was_writing_is_ours_to_delete(tmp_path):
    folder = tmp_path / "out.journal.files"
    folder.mkdir()
    (folder / ".tmpyfOoEJ").write_bytes(b"half a file")
    outputs.check_only(folder, r".+\.safetensors")
    outputs.drop(folder, r".+\.safetensors")
    assert not folder.exists()


def test_a_link_in_a_working_folder_is_not_ours(tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"years of work")
    folder = tmp_path / "out.journal.files"
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(mine)
    with pytest.raises(InputError, match="in the way"):
        outputs.check_only(folder, r".+\.safetensors")
    outputs.drop(folder, r".+\.safetensors")
    assert (folder / "a.safetensors").is_symlink()


def test_a_journal_that_is_a_link_is_refused(tmp_path):
    open_lines(tmp_path / "mine", {"a": 1})
    append_lines(tmp_path / "mine", [{"b": 2}])
    before = (tmp_path / "mine").read_bytes()
    (tmp_path / "journal").symlink_to(tmp_path / "mine")
    with pytest.raises(FileError, match=r"journal: is a link to .*mine, not a journal; choose an"):
        open_lines(tmp_path / "journal", {"a": 1})
    assert (tmp_path / "mine").read_bytes() == before
