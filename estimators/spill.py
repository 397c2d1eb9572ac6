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
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.zeros(*shape, dtype=dtype)
    where = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            _take_room(file.fileno(), nbytes)
            memory = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BitknapError(
                f"{where}: no room for {nbytes:,} bytes of activations; free some, or set TMPDIR "
                "to a folder on another disk"
            ) from None
        raise InputError(f"{where}: cannot be written to ({error.strerror}); set TMPDIR") from None
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def moved(tensor: Tensor, folder: Path | None = None) -> Tensor:
    """Return a copy of a tensor that lies in a file.

    Raises:
        InputError: the folder cannot be written to.
        BitknapError: the disk has no room for it.
    """
    found = on_disk(tensor.shape, tensor.dtype, folder)
    return found.copy_(tensor.detach())


def _take_room(descriptor: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.truncate(descriptor, nbytes)
