"""The hidden folder in which a checkpoint is written, so that a killed run can continue.

    .OUT.partial/journal.jsonl   what the work is about, then one line a finished piece
    .OUT.partial/files/          the unfinished checkpoint; becomes OUT when it is complete

The journal is never ahead of the files. A piece counts as done while the files that it was read
from are unchanged, so that only pieces from a repaired shard are done again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitknap.disk.append_log import keeping, open_lines
from bitknap.disk.atomic import beside, locked
from bitknap.disk.outputs import check_only, writing
from bitknap.errors import FileError, MismatchError
from bitknap.quantization.packed.shards import Shards

_NAMES = r"journal\.jsonl|files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A checkpoint that is not finished.

    Attributes:
        out: the folder that it will become.
        lines: journal entry of each piece when it is done, by number.
    """

    out: Path
    lines: Sequence[Mapping[str, Any]]

    @property
    def folder(self) -> Path:
        """The hidden folder."""
        return beside(self.out, "partial")

    @property
    def files(self) -> Path:
        """The folder of the unfinished checkpoint."""
        return self.folder / "files"

    @property
    def journal(self) -> Path:
        """The journal of finished pieces."""
        return self.folder / "journal.jsonl"

    def allocated(self) -> int:
        """Return the bytes of disk that it takes already."""
        return sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file())

    def begin(self, about: Mapping[str, Any], shards: Shards, *, overwrite: bool) -> set[int]:
        """Return the numbers of the pieces that are done; start afresh if there are none.

        Raises:
            MismatchError: the journal is about something else, and `overwrite` is false.
            FileError: it is no journal, and `overwrite` is false.
        """
        way_out = f"pass `overwrite=True` or delete {self.folder}"
        if self.journal.exists() and shards.are_in(self.files):
            try:
                return self._done(open_lines(self.journal, about, way_out=way_out))
            except (MismatchError, FileError):
                if not overwrite:
                    raise
        elif self.journal.exists() and not overwrite:
            open_lines(self.journal, about, way_out=way_out)
        self._clear()
        with keeping(self.out, self._drop):
            self.files.mkdir()
            shards.create(self.files)
            open_lines(self.journal, about)
        return set()

    def _clear(self) -> None:
        self.journal.unlink(missing_ok=True)  # first, so that it never lists files that are gone
        shutil.rmtree(self.files, ignore_errors=True)

    def _done(self, lines: Sequence[bytes]) -> set[int]:
        done = set()
        for line in lines:
            with contextlib.suppress(
                *(ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)
            ):
                entry = json.loads(line)
                if self.lines[entry["piece"]] == entry:
                    done.add(int(entry["piece"]))
        return done

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it while the block runs.

        Raises:
            InputError: another process uses it, or Bitknap did not write it.
        """
        with writing(self.out):
            check_only(self.folder, _NAMES)
            self.folder.mkdir(exist_ok=True)
            with locked(self.folder, f"{self.out}: another process is writing it"):
                yield

    def keeping(self) -> contextlib.AbstractContextManager[None]:
        """Add to errors of the block what is kept, from which the same command continues.

        Raises:
            BitknapError: the disk is full.
        """
        return keeping(self.out, self._kept)

    def _kept(self) -> str:
        done = self._done(self.journal.read_bytes().splitlines()[1:])
        if not done:
            return self._drop()
        return (
            f"; {len(done)} of {len(self.lines)} pieces are kept in {self.folder}, "
            "and the same command goes on from there"
        )

    def _drop(self) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        return "; no piece is kept"
