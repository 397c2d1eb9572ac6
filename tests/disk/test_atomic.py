"""Files appear whole or not at all, and say which version they are."""

import os
from pathlib import Path

import pytest

from bitknap.disk.atomic import check_space, check_version, read_json, write_whole
from bitknap.errors import FileError, InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_folder_in_the_way_of_a_file(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "file", b"x")
    assert names(tmp_path) == ["file"]


def test_room_is_looked_for_on_the_disk_of_a_folder_to_be(tmp_path):
    check_space(tmp_path / "a" / "b", 1)
    with pytest.raises(InputError) as error:
        check_space(tmp_path / "a" / "b", 10**18)
    assert "b: needs 1,000,000,000,000,000,000 bytes, the disk has " in str(error.value)
    assert str(error.value).endswith("free; free some or choose a folder on another disk")
    assert names(tmp_path) == []


def test_json_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "broken").write_text('{"a":\n')
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, words in (("broken", "not valid JSON"), ("binary", "JSON"), ("none", "No such file")):
        with pytest.raises(FileError, match=words) as error:
            read_json(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)


def check(header):
    check_version(header, "bitknap.plan", "2.3", Path("file"))


def test_versions():
    check({"format": "bitknap.plan", "version": "2.3"})
    check({"format": "bitknap.plan", "version": "2.0"})
    with pytest.warns(UserWarning, match=r"file: version 2\.10 is newer than 2\.3"):
        check({"format": "bitknap.plan", "version": "2.10"})


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": "bitknap.plan", "version": "3.0"}, "3.0 cannot be read by this library"),
        ({"format": "bitknap.plan", "version": "1.9"}, "1.9 cannot be read by this library"),
        ({"format": "bitknap.table", "version": "2.3"}, "'bitknap.table' is not 'bitknap.plan'"),
        ({"version": "2.3"}, "format: None"),
        ({"format": "bitknap.plan"}, "'' is not of the form MAJOR.MINOR"),
        ({"format": "bitknap.plan", "version": 2}, "'2' is not of the form MAJOR.MINOR"),
        ({"format": "bitknap.plan", "version": "2.3.1"}, "is not of the form MAJOR.MINOR"),
    ],
)
def test_other_versions_are_refused(header, words):
    with pytest.raises(FileError) as error:
        check(header)
    assert words in str(error.value)
    assert str(error.value).startswith("file: ")
