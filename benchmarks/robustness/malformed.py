"""Malformed inputs: each is refused in one line or read, and costs nothing that was there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitknap.benchmarks.robustness.forked import CRASHED, Ended, Limits, command, fork
from bitknap.benchmarks.robustness.materials import COMPARING, stopped_comparison
from bitknap.benchmarks.robustness.mutate import Edit, draw, shrunk
from bitknap.benchmarks.robustness.subjects import LINK, SUBJECTS, Subject
from bitknap.benchmarks.robustness.trees import difference, snapshot

MEMORY = 1 << 30
# Files beside the folder that commands run in, which nothing may touch.
_BESIDE = ("beside.txt", "beside.safetensors")
# Where a name out of a damaged file could lead.
_OUTSIDE = ("/outside", "/srv/outside")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One damaged input.

    Attributes:
        subject: what is damaged.
        words: the command that reads it.
        edits: how it is damaged.
        seed: that gives the command and the edits again.
    """

    subject: Subject
    words: tuple[str, ...]
    edits: Sequence[Edit]
    seed: int

    @property
    def limits(self) -> Limits:
        """What the command may take."""
        seconds = self.subject.seconds
        return Limits(seconds=60 * seconds, processor_seconds=seconds, address_bytes=4 * MEMORY)

    @property
    def outputs(self) -> tuple[str, ...]:
        """How lines on what the command may write begin."""
        words = self.words
        names = {"out", words[words.index("-o") + 1]} if "-o" in words else {"out"}
        return tuple(
            f"{what}: work/{start}{name}"
            for what in ("added", "changed", "removed")
            for name in sorted(names)
            for start in ("", ".")
        )


def cases(count: int, seed: int, only: str = "", *, first: int = 0) -> Iterator[Case]:
    """Yield cases; case N is the same whatever the count.

    Args:
        count: the number after the last case's.
        seed: random seed of all of them.
        only: the one subject that is wanted; all when empty.
        first: the first case's number.
    """
    wanted = [one for one in SUBJECTS if only in ("", one.name)]
    shares = [one.share for one in wanted]
    for number in range(first, count):
        chance = random.Random(f"{seed} {number}")
        subject = chance.choices(wanted, shares)[0]
        own = chance.randrange(1 << 48)
        yield Case(
            subject=subject,
            words=chance.choice(subject.commands),
            edits=draw(subject.kinds, own),
            seed=own,
        )


def run_case(case: Case, materials: Path, scratch: Path) -> dict[str, Any] | None:
    """Run a case; return what went wrong, with the fewest edits that do it, or None.

    Args:
        case: what to run.
        materials: the sound files.
        scratch: an empty folder to work in, or one that is not there yet.
    """
    if COMPARING in case.subject.needs:
        stopped_comparison(materials)
    fault = _tried(case, case.edits, materials, scratch)
    if fault is None:
        return None
    kinds = set(fault["faults"])

    def fails(edits: Sequence[Edit]) -> bool:
        found = _tried(case, edits, materials, scratch)
        return found is not None and bool(kinds & set(found["faults"]))

    edits = shrunk(case.edits, fails) if len(case.edits) > 1 else list(case.edits)
    last = _tried(case, edits, materials, scratch) or fault
    return last | {
        "input": case.subject.name,
        "command": " ".join(case.words),
        "seed": case.seed,
        "edits": [list(edit) for edit in edits],
    }


def judged(ended: Ended, changed: Sequence[str], outputs: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the faults of a command on a damaged input, and what it said; None without one.

    Args:
        ended: how it ended.
        changed: lines on what it added, changed and removed.
        outputs: how lines on what it may write begin.
    """
    foreign = [line for line in changed if not line.startswith(outputs)]
    lost = [line for line in foreign if not line.startswith("added")]
    lines = [line for line in ended.err.splitlines() if line.strip()]
    sound = ended.status in (0, 2) and "Traceback" not in ended.err
    found = {
        "hang": ended.late,
        "traceback": ended.status == CRASHED or "Traceback" in ended.err,
        "memory": ended.memory > MEMORY or "MemoryError" in ended.err,
        "loss": bool(lost),
        "outside": bool(foreign) and not lost,
        "crash": not sound and not ended.late and ended.status != CRASHED,
        "words": ended.status == 2 and not (len(lines) == 1 and lines[0].startswith("bitknap: ")),
    }
    faults = [name for name, there in found.items() if there]
    if not faults:
        return None
    return {"faults": faults, "said": lines[-3:], "status": ended.status, "changed": foreign[:5]}


def _tried(
    case: Case, edits: Sequence[Edit], materials: Path, scratch: Path
) -> dict[str, Any] | None:
    subject, work = case.subject, scratch / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    work.mkdir(parents=True)
    for name in _BESIDE:
        (scratch / name).write_text("somebody's own")
    name = _chosen(case, materials)
    for needed in dict.fromkeys((*subject.needs, name)):
        _copied(materials / needed, work / needed)
    file = work / name
    content = [edit for edit in edits if edit.kind != LINK]
    damaged = subject.damage((materials / name).read_bytes(), content)
    file.write_bytes(damaged)
    _linked(file, scratch, edits)
    before = snapshot(scratch)
    ended = fork(command(*case.words), case.limits, folder=work)
    changed = difference(before, snapshot(scratch))
    changed += [f"added: {place}" for place in _OUTSIDE if Path(place).exists()]
    if subject.mended and file.read_bytes() == damaged[: damaged.rfind(b"\n") + 1]:
        changed = [line for line in changed if line != f"changed: work/{name}"]
    return judged(ended, changed, case.outputs)


def _chosen(case: Case, materials: Path) -> str:
    """Return the path of the file that is damaged: of several, the seed chooses one."""
    found = sorted(materials.glob(case.subject.file))
    return str(found[case.seed % len(found)].relative_to(materials))


def _linked(file: Path, scratch: Path, edits: Sequence[Edit]) -> None:
    """Put the links that edits need: `link` for names that lead outside, or one for the file."""
    if any(edit.kind == "path" for edit in edits):
        (file.parent / "link").symlink_to(scratch, target_is_directory=True)
    for seed in [edit.seed for edit in edits if edit.kind == LINK][:1]:
        elsewhere = scratch / f"elsewhere {file.name}"
        file.rename(elsewhere)
        targets = (elsewhere, scratch / "nothing", Path(file.name), scratch / _BESIDE[0], scratch)
        file.symlink_to(targets[seed % len(targets)])


def _copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
