"""Read parts of stored tensors by their place in the file, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from bitknap.errors import FileError
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.source.safetensors_header import DTYPES, TensorInfo


def read_bytes(name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Return bytes start .. stop - 1 of a stored tensor, uint8.

    Raises:
        FileError: the file has shrunk since its header was read.
    """
    buffer = bytearray(stop - start)
    if not buffer:
        return torch.empty(0, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.start + start)
        into, done = memoryview(buffer), 0
        while done < len(buffer):
            count = file.readinto(into[done:])
            if not count:
                raise FileError(f"{info.file}: {name}: truncated since it was opened")
            done += count
    return torch.frombuffer(buffer, dtype=torch.uint8)


def read_ahead(stored: Iterable[TensorInfo]) -> None:
    """Let the system read tensors from the disk while something else is computed.

    This changes no result: where the system cannot read ahead, or a file is gone, nothing happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path, infos in groupby(sorted(stored, key=lambda one: one[2:]), key=lambda one: one.file):
        with contextlib.suppress(OSError), path.open("rb") as file:
            for info in infos:
                length = info.stop - info.start
                os.posix_fadvise(file.fileno(), info.start, length, os.POSIX_FADV_WILLNEED)


def read_tensor(name: str, info: TensorInfo) -> Tensor:
    """Return a copy of a stored tensor.

    Raises:
        FileError: the file has shrunk since its header was read, or torch lacks the dtype.
    """
    data = read_bytes(name, info, 0, info.stop - info.start)
    return data.view(_dtype(name, info)).reshape(info.shape)


def read_rows(name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Return rows start .. stop - 1 of a tensor seen as one matrix of its last dimension.

    Raises:
        FileError: the file has shrunk since its header was read, or torch lacks the dtype.
    """
    dtype = _dtype(name, info)
    width = info.shape[-1]
    row = width * dtype.itemsize
    return read_bytes(name, info, start * row, stop * row).view(dtype).view(-1, width)


def read_slabs(name: str, info: TensorInfo, first: int, last: int) -> Tensor:
    """Return elements first .. last - 1 of a tensor's first dimension, [last - first, ...].

    Raises:
        FileError: the file has shrunk since its header was read.
    """
    size = (info.stop - info.start) // max(1, info.shape[0])
    data = read_bytes(name, info, first * size, last * size)
    return data.view(_dtype(name, info)).view(last - first, *info.shape[1:])


def read_view(info: TensorInfo, view: View) -> Tensor:
    """Return the [out, in] matrix at `view` in a stored tensor, reading little else.

    A transposed matrix is read whole, as its rows are scattered; an interleaved one is read with
    the rows between.

    Raises:
        FileError: the file has shrunk since its header was read, or torch lacks the dtype.
    """
    height = info.shape[-2] // (view.parts or 1)
    base = (view.index or 0) * height
    alone = replace(view, index=None, parts=None)
    if view.transposed:
        return alone.of(read_rows(view.tensor, info, base, base + height))
    start = view.start or 0
    stop = height if view.stop is None else min(view.stop, height)
    rows = read_rows(view.tensor, info, base + start, base + stop)
    return rows[:: view.step]


def _dtype(name: str, info: TensorInfo) -> torch.dtype:
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise FileError(f"{info.file}: {name}: torch cannot hold dtype {info.dtype}")
    return dtype
