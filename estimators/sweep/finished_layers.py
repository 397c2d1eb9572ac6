"""Finished steps of a pass over layers: files beside the journal, for data too large for a line.

A step is done when the journal lists it, which happens once the step's files are on disk. Files
of a step that the journal does not list come from a killed run and are rewritten. The journal
also keeps the size and the CRC-32 of each file, so that a file damaged since then is not used.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitknap.disk.atomic import synced
from bitknap.errors import FileError
from bitknap.estimators.measuring.readings import Readings, folder_of
from bitknap.estimators.sweep.disk_tensors import moved

# Without a journal, tensors smaller than this stay in memory.
_LARGE = 1 << 20
# Bytes of a file that are read at once.
_PART = 1 << 22
_SUFFIXES = ("safetensors", "bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """The steps of one pass, by name; without a journal no step is ever done.

    Attributes:
        readings: the journal.
        name: name of the pass, which distinguishes it from others in the same journal.
    """

    readings: Readings
    name: str

    @classmethod
    def of(cls, readings: Readings, *about: object) -> Shelf:
        """Return the shelf of a pass, named by its inputs."""
        named = hashlib.sha256(repr((*about, "checked")).encode()).hexdigest()[:12]
        return cls(readings=readings, name=named)

    def done(self, step: str) -> bool:
        """Return whether a step is done."""
        return self._kept(step) is not None

    def room(self, step: str) -> Path | None:
        """Return the file of a step's stream; None without a journal."""
        return self._file(step, "bin")

    def put(self, step: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep a finished step with its stream; return its tensors as mapped from disk."""
        file = self._file(step, "safetensors")
        if file is None:
            return {n: x if x.nbytes < _LARGE else moved(x) for n, x in tensors.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, {name: tensor.contiguous() for name, tensor in tensors.items()})
        sums = []
        for path in self._files(step):
            if path.exists():
                synced(path)
            sums += _checksum(path)
        self.readings.keep(self._key(step), sums)
        return self._read(file)

    def get(self, step: str) -> dict[str, Tensor]:
        """Return the tensors of a finished step, which are read on use.

        Raises:
            FileError: the file is missing or damaged.
        """
        kept = self._kept(step)
        assert kept is not None
        for path, size, checksum in zip(self._files(step), kept[::2], kept[1::2], strict=True):
            # Streams that are no longer needed are deleted.
            if (path.suffix != ".bin" or path.exists()) and _checksum(path) != [size, checksum]:
                raise self._damaged(path, "damaged since it was written")
        return self._read(self._files(step)[0])

    def clear(self, step: str) -> None:
        """Delete the stream of a step once it is no longer needed."""
        path = self.room(step)
        if path is not None:
            path.unlink(missing_ok=True)

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            tensors: dict[str, Tensor] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise self._damaged(file, str(error)) from None
        return tensors

    def _damaged(self, file: Path, why: str) -> FileError:
        journal = self.readings.path
        return FileError(f"{file}: cannot be read ({why}); delete {journal} to start anew")

    def _kept(self, step: str) -> list[float] | None:
        """Return size and CRC-32 of a finished step's files, in the order of `_SUFFIXES`."""
        values = self.readings.known(self._key(step), 2 * len(_SUFFIXES))
        return None if values is None else [float(value) for value in values]

    def _files(self, step: str) -> list[Path]:
        files = (self._file(step, suffix) for suffix in _SUFFIXES)
        return [path for path in files if path is not None]

    def _key(self, step: str) -> str:
        return f"{self.name}/{step}"

    def _file(self, step: str, suffix: str) -> Path | None:
        if self.readings.path is None:
            return None
        return folder_of(self.readings.path) / f"{self.name}.{step}.{suffix}"


def _checksum(path: Path) -> list[float]:
    """Return size and CRC-32 of a file, zeros if it is missing."""
    size = checksum = 0
    if path.is_file():
        with path.open("rb") as file:
            while part := file.read(_PART):
                size, checksum = size + len(part), zlib.crc32(part, checksum)
    return [float(size), float(checksum)]


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        # safetensors gives the system's error number only in its message.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(file)) from None
