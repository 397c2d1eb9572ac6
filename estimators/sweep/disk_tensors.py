"""Memory-mapped tensors, for data that does not fit in memory beside a layer.

A file without a name is deleted with its tensor, even if the process is killed; one with a name
stays. Its space is allocated when it is created, so that a full disk raises an error then, not a
signal later.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitknap.disk.append_log import FULL
from bitknap.errors import BitknapError, FileError, InputError


def on_disk(
    shape: Sequence[int],
    dtype: torch.dtype,
    folder: Path | None = None,
    *,
    path: Path | None = None,
) -> Tensor:
    """Return a tensor of zeros in a file of its own.

    Args:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        folder: folder of a file without a name; the system's temporary folder when not given.
        path: named file to use instead, for `read_back`.

    Raises:
        InputError: the folder cannot be written to.
        BitknapError: the disk has no room for it.
    """
    if not math.prod(shape):
        return torch.zeros(*shape, dtype=dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = _mapped(nbytes, folder) if path is None else _named(path, nbytes)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def read_back(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor in a file of `on_disk`; later writes to the tensor do not reach the file.

    Raises:
        FileError: the file is missing or is not as long as the tensor.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise FileError(f"{path}: cannot be read ({error})") from None
    if len(memory) != nbytes:
        raise FileError(f"{path}: has {len(memory):,} bytes, expected {nbytes:,}")
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def moved(tensor: Tensor, dtype: torch.dtype | None = None, folder: Path | None = None) -> Tensor:
    """Return a copy of a tensor in a file, which is not in memory until it is read.

    Args:
        tensor: the tensor to copy.
        dtype: dtype of the copy; the tensor's when not given.
        folder: folder of the file; the system's temporary folder when not given.

    Raises:
        InputError: the folder cannot be written to.
        BitknapError: the disk has no room for it.
    """
    kind = dtype or tensor.dtype
    if not tensor.numel():
        return torch.zeros(*tensor.shape, dtype=kind)
    memory = _mapped(tensor.numel() * kind.itemsize, folder)
    copy = torch.frombuffer(memory, dtype=kind).view(*tensor.shape).copy_(tensor.detach())
    if hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)
    return copy


def _mapped(nbytes: int, folder: Path | None) -> mmap.mmap:
    """Return the memory of a new file of zeros that has no name."""
    where = folder or Path(tempfile.gettempdir())
    with (
        _disk_errors(where, nbytes, "set TMPDIR to a folder on another disk", "set TMPDIR"),
        tempfile.TemporaryFile(dir=where) as file,
    ):
        _take_room(file.fileno(), nbytes)
        return mmap.mmap(file.fileno(), nbytes)


def _named(path: Path, nbytes: int) -> mmap.mmap:
    """Return the memory of a file of zeros."""
    other = "choose another output"
    with _disk_errors(path.parent, nbytes, other, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            _take_room(file.fileno(), nbytes)
            return mmap.mmap(file.fileno(), nbytes)


@contextlib.contextmanager
def _disk_errors(where: Path, nbytes: int, full: str, closed: str) -> Iterator[None]:
    """Add a remedy to the block's errors about a full disk or an unwritable folder."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise BitknapError(
                f"{where}: no room for {nbytes:,} bytes of activations on the disk; free some, or "
                f"{full}"
            ) from None
        raise InputError(f"{where}: cannot be written to ({error.strerror}); {closed}") from None


def _take_room(descriptor: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.truncate(descriptor, nbytes)
