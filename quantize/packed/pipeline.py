"""A pipeline of pieces: one thread reads ahead, the caller's thread rounds, one thread writes.

Finished pieces are recorded in a journal in batches, once they are on the disk, so that a killed
run continues from there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from bitknap.disk.append_log import append_lines
from bitknap.quantization.packed.work_pieces import Span

# A kill loses at most what was written since the last batch.
BATCH_BYTES, BATCH_SECONDS = 1 << 28, 5.0
# Pieces that wait between reading and rounding, and between rounding and writing.
_AHEAD = 2

Item = TypeVar("Item")
Given = TypeVar("Given")
Asked = TypeVar("Asked", contravariant=True)


class Maker(Protocol[Asked]):
    """What makes the bytes of pieces; reading and making may happen at the same time."""

    def read(self, piece: Asked) -> Tensor:
        """Return a piece's input."""
        ...

    def make(self, piece: Asked, given: Tensor) -> list[Span]:
        """Return the bytes that a piece writes, from what `read` gave."""
        ...


class Output:
    """Files that are written in place, and the journal that says which pieces are in them.

    Args:
        folder: holds the files, which have their full size.
        journal: the journal to which finished pieces are added.
    """

    def __init__(self, folder: Path, journal: Path) -> None:
        self._folder, self._journal = folder, journal
        self._handles: dict[str, int] = {}
        self._waiting: list[Mapping[str, Any]] = []
        self._touched: set[int] = set()
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # If the disk is full, the first error has said so already.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.sync()
        for handle in self._handles.values():
            os.close(handle)

    def write(self, line: Mapping[str, Any], spans: Sequence[Span]) -> None:
        """Write a piece's bytes, and record it in the journal with the next batch."""
        for (file, start), data in spans:
            if file not in self._handles:
                self._handles[file] = os.open(self._folder / file, os.O_WRONLY | os.O_NOFOLLOW)
            write_at(self._handles[file], data, start)
            self._touched.add(self._handles[file])
            self._bytes += len(data)
        self._waiting.append(line)
        if self._bytes >= BATCH_BYTES or time.monotonic() - self._since >= BATCH_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Flush written bytes to the disk, then record their pieces in the journal."""
        for handle in self._touched:
            os.fsync(handle)
        if self._waiting:
            append_lines(self._journal, self._waiting)
        self._waiting, self._touched = [], set()
        self._bytes, self._since = 0, time.monotonic()


def write_at(handle: int, data: Tensor, start: int) -> None:
    """Write all bytes of a tensor, uint8, into an open file from byte `start` on."""
    left = data.contiguous().numpy().reshape(-1).data
    while left:
        written = os.pwrite(handle, left, start)
        left, start = left[written:], start + written


def run(
    work: Maker[Item],
    todo: Mapping[int, Item],
    lines: Sequence[Mapping[str, Any]],
    output: Output,
    done: Callable[[int], None],
) -> None:
    """Do pieces of work; an error of any thread is raised here once finished pieces are written.

    Args:
        work: all the work.
        todo: the pieces, by number.
        lines: journal entry of each piece when it is finished, by number.
        output: writes the bytes of pieces.
        done: called with the number of pieces that were handed to the writer.
    """
    written: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer, contextlib.closing(_ahead(work.read, todo)) as given:
        for count, (number, weights) in enumerate(given, start=1):
            spans = work.make(todo[number], weights)
            written.append(writer.submit(output.write, lines[number], spans))
            if len(written) > _AHEAD:
                written.popleft().result()
            done(count)
        for future in written:
            future.result()


def _ahead(
    read: Callable[[Item], Given], items: Mapping[int, Item]
) -> Generator[tuple[int, Given]]:
    """Yield the number of each item and what was read for it, while the next ones are read."""
    reading: deque[tuple[int, Future[Given]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for number, item in items.items():
                reading.append((number, reader.submit(read, item)))
                if len(reading) > _AHEAD:
                    first, future = reading.popleft()
                    yield first, future.result()
            for first, future in reading:
                yield first, future.result()
        finally:
            for _, future in reading:
                future.cancel()
