"""Kill a command at random moments, repeat it, and compare with a run that nobody killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitknap.benchmarks.robustness.commands import Long
from bitknap.benchmarks.robustness.forked import Limits, command, fork
from bitknap.benchmarks.robustness.studies import Trials, judged_study, trials_of
from bitknap.benchmarks.robustness.trees import difference, snapshot
from bitknap.errors import BitknapError

SECONDS = Limits(seconds=900.0)
# Calls on the file system; a kill right before or right after the n-th of them hits windows that
# random moments do not.
_CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "truncate", "open")


def run_kills(
    long: Long, count: int, seed: str, materials: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield what became of each kill: "landed", and "faults" with what was lost, [] if nothing.

    Half of the kills come at random moments of the time that a whole run takes, half at random
    calls on the file system.

    Args:
        long: what is killed.
        count: number of kills that find the command running.
        seed: random seed of the moments.
        materials: the sound files.
        scratch: a folder to work in.
    """
    whole = whole_run(long, materials, scratch)
    chance = random.Random(f"{seed} {long.name}")
    landed = tries = 0
    while landed < count and tries < 4 * count:
        tries += 1
        before = laid_out(long, materials, scratch)
        if chance.random() < 0.5:
            moment = chance.random() * whole.seconds
            ended = fork(command(*long.words), SECONDS, kill_after=moment, folder=scratch)
            when = f"{moment:.4f} s of {whole.seconds:.4f}"
        else:
            call, after = 1 + chance.randrange(whole.calls), chance.random() < 0.5
            ended = fork(_killed(long, call, after), SECONDS, folder=scratch)
            when = f"{'after' if after else 'before'} call {call} of {whole.calls}"
        if ended.status is not None:
            continue
        landed += 1
        faults = _beside(long, before, scratch)
        if long.storage:
            faults += judged_study(long, ended, whole.trials, scratch, SECONDS)
        else:
            faults += _judged(long, before, whole, scratch)
        yield {"command": long.name, "when": when, "faults": faults}


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A run that nobody kills: how long it takes, its calls on the file system, what it leaves."""

    seconds: float
    calls: int
    left: Mapping[str, str]
    trials: Trials


def whole_run(long: Long, materials: Path, scratch: Path) -> Whole:
    laid_out(long, materials, scratch)
    counted = fork(_counting(long), SECONDS, folder=scratch)
    if counted.status != 0:
        raise BitknapError(f"{long.name}: cannot be run at all ({counted.err.strip()})")
    left, trials = _left(long, scratch)
    laid_out(long, materials, scratch)
    again = fork(command(*long.words), SECONDS, folder=scratch)
    if (left, trials) != _left(long, scratch):
        raise BitknapError(f"{long.name}: two whole runs differ")
    calls = max(1, int(counted.out.split()[-1]))
    return Whole(seconds=again.seconds, calls=calls, left=left, trials=trials)


def _left(long: Long, scratch: Path) -> tuple[dict[str, str], Trials]:
    """Return what a whole run leaves: files; of a study, whose file has times in it, its trials."""
    trials = trials_of(long, scratch, SECONDS) if long.storage else ()
    left = snapshot(scratch, long.times)
    if long.storage:
        left = {name: kind for name, kind in left.items() if not ours(name, long.out)}
    return left, trials


def laid_out(
    long: Long, materials: Path, scratch: Path, beside: Path | None = None
) -> dict[str, str]:
    """Make the folder anew: the materials, somebody's own files beside, and the old result.

    Args:
        long: what will be run there.
        materials: the sound files.
        scratch: the folder.
        beside: where the old result is kept once it is made, as a name that begins so.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in long.needs:
        if (materials / name).is_dir():
            shutil.copytree(materials / name, scratch / name)
        else:
            shutil.copyfile(materials / name, scratch / name)
    (scratch / "mine").mkdir()
    for name in ("mine/thesis.txt", ".hidden", "outline.txt", "model.txt"):
        (scratch / name).write_text("years of work")
    if long.old:
        kept = beside or scratch
        made = kept.with_name(f"{kept.name}.old {long.out} {long.name}")
        if not made.exists():
            fork(command(*long.old), SECONDS, folder=scratch)
            (scratch / long.out).rename(made)
        if made.is_dir():
            shutil.copytree(made, scratch / long.out)
        else:
            shutil.copyfile(made, scratch / long.out)
    return snapshot(scratch)


def _judged(long: Long, before: Mapping[str, str], whole: Whole, scratch: Path) -> list[str]:
    """Look at what a kill left, repeat the command, and return what is not as it should be."""
    out, faults = long.out, []

    def now() -> dict[str, str]:
        return snapshot(scratch, long.times)

    if long.old and not _is_whole(part(now(), out), out, before, whole.left):
        faults += [f"after the kill: neither the old {out} nor the new one is there"]
    ended = fork(command(*long.words), SECONDS, folder=scratch)
    if ended.status == 2 and "exists" in ended.err:
        # The kill came after the last rename: what is there must be whole.
        if not _is_whole(part(now(), out), out, {}, whole.left):
            faults.append(f"the repeated run says that {out} exists, and it is not whole")
        ended = fork(command(*long.words, "--overwrite"), SECONDS, folder=scratch)
    if ended.status != 0:
        said = ended.err.strip().splitlines()[-1:]
        faults.append(f"the repeated run ended with {ended.status}: {said}")
    faults += [f"after the repeated run: {line}" for line in difference(whole.left, now())]
    return faults


def _beside(long: Long, before: Mapping[str, str], scratch: Path) -> list[str]:
    """Return what a kill changed that is none of the command's own."""
    return [
        f"after the kill: {line}"
        for line in difference(before, snapshot(scratch))
        if not ours(line.partition(": ")[2], long.out)
    ]


def ours(name: str, out: str) -> bool:
    """Return whether a path is the output, or a thing of the command's own beside it."""
    first = name.split("/")[0]
    # SQLite's own journal of changes is called so.
    return first == out or first.startswith((f"{out}.", f".{out}.", f"{out}-journal"))


def below(folder: Path, out: str) -> list[Path]:
    """Return the files of an output: itself, or those in it."""
    path = folder / out
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def part(found: Mapping[str, str], out: str) -> dict[str, str]:
    """Return the part of a snapshot that is an output."""
    return {name: kind for name, kind in found.items() if name.split("/")[0] == out}


def _is_whole(
    found: Mapping[str, str], out: str, before: Mapping[str, str], after: Mapping[str, str]
) -> bool:
    return found in (part(before, out), part(after, out)) and bool(found)


def _counting(long: Long) -> Callable[[], None]:
    def run() -> None:
        calls = [0]

        def count() -> None:
            calls[0] += 1

        _watch(count, lambda: None)
        command(*long.words)()
        print(f"\n{calls[0]}")

    return run


def _killed(long: Long, call: int, after: bool) -> Callable[[], None]:
    def run() -> None:
        calls = [0]

        def count(now: bool) -> None:
            calls[0] += now
            if calls[0] == call and now != after:
                os.kill(os.getpid(), signal.SIGKILL)

        _watch(lambda: count(True), lambda: count(False))
        command(*long.words)()

    return run


def _watch(before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` around each call on the file system of this process."""

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            before()
            found = real(*arguments, **named)
            after()
            return found

        return call

    for name in _CALLS:
        setattr(os, name, watched(getattr(os, name)))
