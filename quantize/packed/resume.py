"""Outputs that are written piece by piece, and go on where a killed run stopped.

    .OUT.partial/journal.jsonl   what the work is about, then one line a finished piece
    .OUT.partial/files/          the unfinished output; becomes OUT, or has it, when it is complete

All files have their sizes and heads before any piece is made, and every piece goes to places of its
own: a run that was stopped ends with the same bytes as one that was not. The journal is never ahead
of the files. A piece counts as done while the files that it was read from are unchanged, so that
only pieces from a repaired shard are done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.disk.append_log import keeping, open_lines
from bitknap.disk.atomic import beside, locked
from bitknap.disk.outputs import Kind, check_only, place, place_file, writing
from bitknap.errors import FileError, MismatchError
from bitknap.progress import Progress
from bitknap.quantization.packed.pipeline import Item, Maker, Output, run
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.checkpoint import Checkpoint

_NAMES = r"journal\.jsonl|files"


class Frame(Protocol):
    """Files with their full sizes, before any piece is in them."""

    def create(self, folder: Path) -> None:
        """Write them into an empty folder."""
        ...

    def are_in(self, folder: Path) -> bool:
        """Return whether a folder has them, whatever pieces are in them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """An output that is not finished.

    Attributes:
        out: the folder or file that it will become.
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
        """The folder of the unfinished files."""
        return self.folder / "files"

    @property
    def journal(self) -> Path:
        """The journal of finished pieces."""
        return self.folder / "journal.jsonl"

    def allocated(self) -> int:
        """Return the bytes of disk that it takes already."""
        return sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file())

    def begin(self, about: Mapping[str, Any], frame: Frame, *, overwrite: bool) -> set[int]:
        """Return the numbers of the pieces that are done; start afresh if there are none.

        Raises:
            MismatchError: the journal is about something else, and `overwrite` is false.
            FileError: it is no journal, and `overwrite` is false.
        """
        way_out = f"pass `overwrite=True` or delete {self.folder}"
        if self.journal.exists() and frame.are_in(self.files):
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
            frame.create(self.files)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[Item]):
    """What is to be written.

    Attributes:
        out: the output.
        kind: whether it is a file or a folder.
        maker: makes the bytes of pieces.
        pieces: all of them.
        stamps: a digest for each piece that changes with what it is read from.
        frame: the files, before any piece is in them; of a single file, one of the output's name.
        about: all that the bytes depend on besides, JSON values.
        copied_from: folder of the model, whose files an earlier version copied into the output.
    """

    out: Path
    kind: Kind
    maker: Maker[Item]
    pieces: Sequence[Item]
    stamps: Sequence[str]
    frame: Frame
    about: Mapping[str, Any]
    copied_from: Path | None = None

    @property
    def partial(self) -> Partial:
        """Where the output is while it is not finished."""
        lines = [{"piece": n, "source": stamp} for n, stamp in enumerate(self.stamps)]
        return Partial(out=self.out, lines=lines)

    @contextlib.contextmanager
    def made(
        self, what: str, *, overwrite: bool, progress: Progress | None = None
    ) -> Iterator[Path]:
        """Yield the folder of the files with all pieces in them; it becomes the output.

        The block adds what else belongs to the output, and checks it. After an error in it, or in
        a piece, the same call goes on from the pieces that are finished.

        Args:
            what: the work, for `progress`.
            overwrite: whether an output that this tool wrote is replaced, and unfinished files of a
                run with other inputs.
            progress: called with (what, done, of) after each piece.

        Raises:
            MismatchError: a run with other inputs was left unfinished.
            BitknapError: the disk is full.
        """
        partial = self.partial
        with partial.locked():
            done = partial.begin(self.about, self.frame, overwrite=overwrite)
            with partial.keeping():
                self._fill(partial, done, what, progress)
                yield partial.files
            if self.kind == "folder":
                place(partial.files, self.out, overwrite=overwrite, copied_from=self.copied_from)
            else:
                place_file(partial.files / self.out.name, self.out, overwrite=overwrite)
            shutil.rmtree(partial.folder)

    def _fill(self, partial: Partial, done: set[int], what: str, progress: Progress | None) -> None:
        todo = {number: piece for number, piece in enumerate(self.pieces) if number not in done}

        def tell(count: int) -> None:
            if progress is not None:
                progress(what, len(done) + count - 1, len(self.pieces))

        with Output(partial.files, partial.journal) as output:
            run(self.maker, todo, partial.lines, output, tell)


def identity(
    source: Checkpoint, plan: BitPlan, rounding: Rounding, layout: Iterable[Any]
) -> dict[str, Any]:
    """Return the values that tell a journal whether other work would write the same bytes.

    Args:
        source: the model.
        plan: the format of each of its units, in the order of the pieces' units.
        rounding: how they are rounded.
        layout: heads of files, and pieces.
    """
    names = [plan.format_of(unit).name for unit in range(len(plan.units))]
    return {
        "model": source.fingerprint,
        "plan": digest_of(json.dumps(names)),
        "method": settings(rounding),
        "layout": digest_of(repr([*map(_listed, layout)])),
    }


def digest_of(text: str) -> str:
    """Return the SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def settings(rounding: Rounding) -> dict[str, str]:
    """Return the name of a rounding method and its settings."""
    names: list[str] = [f.name for f in fields(rounding)] if is_dataclass(rounding) else []
    return {"name": rounding.name} | {name: str(getattr(rounding, name)) for name in names}


def _listed(one: Any) -> Any:
    """Return a piece as texts and lists, and anything else as it is."""
    if not isinstance(one, tuple):
        return one
    return [x.tolist() if isinstance(x, np.ndarray) else str(x) for x in one]
