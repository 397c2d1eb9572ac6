"""Tensors that lie in files: written, read back, and refused in one line."""

import errno

import pytest
import torch

from bitknap.errors import BitknapError, FileError, InputError
from bitknap.estimators.sweep import (
    disk_tensors,
)


def test_files_of_tensors(tmp_path):
    found = disk_tensors.moved(torch.arange(6).view(2, 3), torch.float32, tmp_path)
    assert torch.equal(found, torch.arange(6.0).view(2, 3))
    assert disk_tensors.moved(torch.zeros(0, 3)).shape == (0, 3)
    assert list(tmp_path.iterdir()) == []  # without a name from the start
    assert disk_tensors.on_disk((0, 3), torch.float32, tmp_path).shape == (0, 3)
    path = tmp_path / "named"
    disk_tensors.on_disk((2, 3), torch.bfloat16, path=path).fill_(1.5)
    assert torch.equal(
        disk_tensors.read_back(path, (2, 3), torch.bfloat16), torch.full((2, 3), 1.5)
    )
    with pytest.raises(FileError, match=r"named: has 12 bytes, expected 8$"):
        disk_tensors.read_back(path, (2, 1), torch.float32)
    path.unlink()
    with pytest.raises(FileError, match=r"named: cannot be read"):
        disk_tensors.read_back(path, (2, 1), torch.float32)
    with pytest.raises(InputError, match=r"none: cannot be written to .*; set TMPDIR$"):
        disk_tensors.on_disk((1,), torch.float32, tmp_path / "none")


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        BitknapError, match=r": no room for 40 bytes of activations on the disk; free some, or"
    ):
        disk_tensors.on_disk((10,), torch.float32, tmp_path)
