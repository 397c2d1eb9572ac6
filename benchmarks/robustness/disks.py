"""A disk that is full at a random byte: what was there stays, and the command goes on with room."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitknap.benchmarks.robustness.commands import Long
from bitknap.benchmarks.robustness.forked import Limits, command, fork, small_disk
from bitknap.benchmarks.robustness.kills import below, laid_out, ours, part, whole_run
from bitknap.benchmarks.robustness.trees import difference, snapshot

# tmpfs counts in pages.
_PAGE = 4096
_LIMITS = Limits(seconds=300.0)
_WAYS = ("disk", "file")


def run_full(
    long: Long, count: int, seed: str, materials: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield what became of each full disk: "landed" if the command noticed it, and "faults".

    Two ways in turn: a small disk of its own with a random number of free pages, where this
    machine lets us mount one, and a random limit on the bytes of each file.

    Args:
        long: what is run.
        count: number of disks.
        seed: random seed of their sizes.
        materials: the sound files.
        scratch: a folder to work in.
    """
    whole = whole_run(long, materials, scratch)
    most = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    largest = max(file.stat().st_size for file in below(scratch, long.out))
    chance = random.Random(f"{seed} {long.name}")
    for number in range(count):
        way = _WAYS[number % 2]
        room = chance.randrange(1, largest) if way == "file" else chance.randrange(most // _PAGE)
        ended = fork(lambda: _tried(long, way, room, materials, scratch, dict(whole.left)), _LIMITS)  # noqa: B023
        if ended.status != 0:
            said = ended.err.strip().splitlines()[-1:] or [f"status {ended.status}"]
            found = {"landed": False, "faults": [f"the campaign itself failed: {said[0]}"]}
        else:
            found = json.loads(ended.out.strip().splitlines()[-1])
        yield {"command": long.name, "way": way, "room": room, **found}


def _tried(
    long: Long, way: str, room: int, materials: Path, scratch: Path, left: dict[str, str]
) -> None:
    """Run in a child, which alone sees the small disk; print what became of it."""
    folder = scratch
    if way == "disk":
        folder = scratch.with_name(f"{scratch.name}.disk")
        folder.mkdir(parents=True, exist_ok=True)
        small_disk(folder, 64 << 20)
        folder = folder / "work"
    before = laid_out(long, materials, folder, beside=scratch)
    limits = Limits(seconds=300.0, file_bytes=room if way == "file" else None)
    ballast = folder.parent / "ballast"
    if way == "disk":
        _fill(ballast, room)
    ended = fork(command(*long.words), limits, folder=folder)
    if way == "disk":
        ballast.unlink()
    faults = [
        f"with a full disk: {line}"
        for line in difference(before, snapshot(folder))
        if not ours(line.partition(": ")[2], long.out)
    ]
    lines = [line for line in ended.err.splitlines() if line.strip()]
    if ended.status not in (0, 2) or "Traceback" in ended.err:
        faults.append(f"with a full disk: status {ended.status}, {lines[-1:]}")
    elif ended.status == 2 and len(lines) != 1:
        faults.append(f"with a full disk: {len(lines)} lines, {lines}")
    if ended.status == 2:
        now = part(snapshot(folder, long.times), long.out)
        if now and now not in (part(before, long.out), part(left, long.out)):
            faults.append(f"with a full disk: a half-written {long.out}")
        again = fork(command(*long.words), _LIMITS, folder=folder)
        if again.status != 0:
            faults.append(f"with room again: status {again.status}, {again.err.strip()[-200:]}")
    faults += [f"with room again: {x}" for x in difference(left, snapshot(folder, long.times))]
    sys.stdout.write("\n" + json.dumps({"landed": ended.status == 2, "faults": faults}) + "\n")


def _fill(ballast: Path, pages: int) -> None:
    """Leave so many pages free on the disk."""
    state = os.statvfs(ballast.parent)
    take = max(0, state.f_bavail * state.f_frsize - (pages + 1) * _PAGE)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, take))
