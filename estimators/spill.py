"""Tensors whose memory is a file: what does not fit beside a layer waits on the disk.

The file has no name and is gone when its tensor is, whatever ends the process. Its room is taken
when it is made, so that a full disk is told then and not by a signal later.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitknap.errors import BitknapError, InputError


def on_disk(shape: Sequence[int], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """Return a tensor of zeros in a file of its own.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        folder: where the file lies; the system's temporary folder when not given.

    Raises:
        InputError: the folder cannot be written to.
        BitknapError: the disk has no room for it.
    """
    if not math.prod(shape):
        return torch.zeros(*shape, dtype=dtype)
    memory = _mapped(math.prod(shape) * dtype.itemsize, folder)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def moved(tensor: Tensor, dtype: torch.dtype | None = None, folder: Path | None = None) -> Tensor:
    """Return a copy of a tensor that lies in a file, and is not in memory until it is read.

    Args:
        tensor: what to copy.
        dtype: of the copy; the tensor's when not given.
        folder: where the file lies; the system's temporary folder when not given.

    Raises:
        InputError: the folder cannot be written to.
        BitknapError: the disk has no room for it.
    """
    kind = dtype or tensor.dtype
    if not tensor.numel():
        return torch.zeros(*tensor.shape, dtype=kind)
    memory = _mapped(tensor.numel() * kind.itemsize, folder)
    found = torch.frombuffer(memory, dtype=kind).view(*tensor.shape).copy_(tensor.detach())
    if hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)
    return found


def _mapped(nbytes: int, folder: Path | None) -> mmap.mmap:
    """Return the memory of a new file of zeros that has no name."""
    where = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            _take_room(file.fileno(), nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BitknapError(
                f"{where}: no room for {nbytes:,} bytes of activations; free some, or set TMPDIR "
                "to a folder on another disk"
            ) from None
        raise InputError(f"{where}: cannot be written to ({error.strerror}); set TMPDIR") from None


def _take_room(descriptor: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.truncate(descriptor, nbytes)
