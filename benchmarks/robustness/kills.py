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

from bitknap.benchmarks.robustness.forked import Limits, command, fork
from bitknap.benchmarks.robustness.materials import FAST
from bitknap.benchmarks.robustness.trees import difference, snapshot
from bitknap.errors import BitknapError

_TEXT = ("--text", "text.txt")
_LAYERS = ("--max-memory", "5600kB")
_SECONDS = Limits(seconds=300.0)
# Calls on the file system; a kill right before or right after the n-th of them hits windows that
# random moments do not.
_CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "truncate", "open")


@dataclass(frozen=True, slots=True, kw_only=True)
class Long:
    """A command that takes long on real models.

    Attributes:
        name: of the case.
        words: of the command, which is run beside the materials it needs.
        needs: those materials.
        old: a command whose result is there before, for --overwrite; none when empty.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    old: tuple[str, ...] = ()

    @property
    def out(self) -> str:
        """What the command writes."""
        return self.words[self.words.index("-o") + 1]


def _estimate(*words: str) -> tuple[str, ...]:
    return ("estimate", "model", *FAST, *_TEXT, *words, "-o", "out.safetensors")


def _quantize(*words: str) -> tuple[str, ...]:
    return ("quantize", "model", *FAST, *_TEXT, *words, "-o", "out")


def _packed(*words: str) -> tuple[str, ...]:
    return ("quantize", "model", *words, "-o", "out")


_MODEL = ("model", "text.txt")
_GPTQ = ("--method", "gptq")
_LAYERED = ("--estimator", "moments", *_LAYERS)
# Every reading of this one is a line of a journal; one group size makes them few.
_KL = ("--estimator", "measured-kl", "--group-size", "row")
_SORTED = (*_KL, "--row-blocks", "2", "--permute")
_OVER = (*_KL, "--overwrite")
_BY_LAYER = ("--budget", "4bpw", *_LAYERED, *_GPTQ)
_CONVERT = ("convert", "packed-shards", "--layout", "tiles", "-o", "out")
_SHARDS = ("--plan", "plan.json", "--max-shard-size", "100KB")
_PLANNED_GPTQ = (*_GPTQ, "--force", "--tokens", "128", *_TEXT)
_PLANNED = (*_MODEL, "plan.json", "other.json")
_OLD = _packed("--plan", "other.json")
COMMANDS = tuple(
    Long(name=name, words=words, needs=needs, old=old)
    for name, words, needs, old in (
        ("estimate, whole", _estimate(*_KL), _MODEL, ()),
        ("estimate, gptq", _estimate("--estimator", "moments", *_GPTQ), _MODEL, ()),
        ("estimate, by layer", _estimate(*_LAYERED), _MODEL, ()),
        ("estimate, sorted rows", _estimate(*_SORTED), _MODEL, ()),
        ("estimate, over another", _estimate(*_OVER), _MODEL, _estimate("--estimator", "moments")),
        ("quantize by a plan", _packed(*_SHARDS), _PLANNED, ()),
        ("quantize by a plan, gptq", _packed(*_SHARDS, *_PLANNED_GPTQ), _PLANNED, ()),
        ("quantize over another", _packed(*_SHARDS, "--overwrite"), _PLANNED, _OLD),
        ("quantize to a budget", _quantize("--budget", "4bpw", *_KL), _MODEL, ()),
        ("quantize to a budget, by layer", _quantize(*_BY_LAYER), _MODEL, ()),
        ("convert", _CONVERT, ("packed-shards",), ()),
        ("convert over another", (*_CONVERT, "--overwrite"), ("packed-shards", *_PLANNED), _OLD),
    )
)


def run_kills(
    long: Long, count: int, seed: str, materials: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield what became of each kill: "landed", and "faults" with what was lost, [] if nothing.

    Half of the kills come at random moments of the time that a whole run takes, half at random
    calls on the file system.

    Args:
        long: what is killed.
        count: of kills that find the command running.
        seed: of the moments.
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
            ended = fork(command(*long.words), _SECONDS, kill_after=moment, folder=scratch)
            when = f"{moment:.4f} s of {whole.seconds:.4f}"
        else:
            call, after = 1 + chance.randrange(whole.calls), chance.random() < 0.5
            ended = fork(_killed(long, call, after), _SECONDS, folder=scratch)
            when = f"{'after' if after else 'before'} call {call} of {whole.calls}"
        if ended.status is not None:
            continue
        landed += 1
        faults = _judged(long, before, whole, scratch)
        yield {"command": long.name, "when": when, "faults": faults}


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A run that nobody kills: how long it takes, its calls on the file system, what it leaves."""

    seconds: float
    calls: int
    left: Mapping[str, str]


def whole_run(long: Long, materials: Path, scratch: Path) -> Whole:
    laid_out(long, materials, scratch)
    counted = fork(_counting(long), _SECONDS, folder=scratch)
    if counted.status != 0:
        raise BitknapError(f"{long.name}: cannot be run at all ({counted.err.strip()})")
    left = snapshot(scratch)
    laid_out(long, materials, scratch)
    again = fork(command(*long.words), _SECONDS, folder=scratch)
    if difference(left, snapshot(scratch)):
        raise BitknapError(f"{long.name}: two whole runs differ")
    return Whole(seconds=again.seconds, calls=max(1, int(counted.out.split()[-1])), left=left)


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
            fork(command(*long.old), _SECONDS, folder=scratch)
            (scratch / long.out).rename(made)
        if made.is_dir():
            shutil.copytree(made, scratch / long.out)
        else:
            shutil.copyfile(made, scratch / long.out)
    return snapshot(scratch)


def _judged(long: Long, before: Mapping[str, str], whole: Whole, scratch: Path) -> list[str]:
    """Look at what a kill left, repeat the command, and return what is not as it should be."""
    out = long.out
    faults = [
        f"after the kill: {line}"
        for line in difference(before, snapshot(scratch))
        if not ours(line.partition(": ")[2], out)
    ]
    if long.old and not _is_whole(part(snapshot(scratch), out), out, before, whole.left):
        faults += [f"after the kill: neither the old {out} nor the new one is there"]
    ended = fork(command(*long.words), _SECONDS, folder=scratch)
    if ended.status == 2 and "exists" in ended.err:
        # The kill came after the last rename: what is there must be whole.
        if not _is_whole(part(snapshot(scratch), out), out, {}, whole.left):
            faults.append(f"the repeated run says that {out} exists, and it is not whole")
        ended = fork(command(*long.words, "--overwrite"), _SECONDS, folder=scratch)
    if ended.status != 0:
        said = ended.err.strip().splitlines()[-1:]
        faults.append(f"the repeated run ended with {ended.status}: {said}")
    faults += [
        f"after the repeated run: {line}" for line in difference(whole.left, snapshot(scratch))
    ]
    return faults


def ours(name: str, out: str) -> bool:
    """Return whether a path is the output, or a thing of the command's own beside it."""
    first = name.split("/")[0]
    return first == out or first.startswith((f"{out}.", f".{out}."))


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
