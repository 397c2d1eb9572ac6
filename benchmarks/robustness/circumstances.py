"""Commands in circumstances of all kinds: the result is the ordinary one, and nothing else changes.

Two processes write one output; the clock goes backwards; the source is read-only, or is reached
through links; the locale is C; names hold what names may hold.
"""

from __future__ import annotations

import json
import locale
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitknap.benchmarks.robustness.forked import Limits, command, fork, read_only
from bitknap.benchmarks.robustness.kills import ours
from bitknap.benchmarks.robustness.materials import FAST
from bitknap.benchmarks.robustness.trees import difference, snapshot

_LIMITS = Limits(seconds=900.0)
_IN, _OUT = "IN", "OUT"
# Seconds in which the second of two processes starts after the first.
_APART = 0.5
_NAMES = (
    *(
        " spaces  in it ",
        "a\nnew line",
        "ünï-模型-🙂",
        "-o",
        "--help",
        "n" * 220,
        "é" * 110,
        "\udcff",
    ),
    *("~a", "a'b\"c", "[bold]x[b]", "%s{0}$HOME", "a\tb\\c", "...", "#x?y=z", "*"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A short command.

    Attributes:
        name: of the task.
        words: of the command, with IN and OUT for its paths.
        source: the material that it reads as IN.
        needs: other materials.
        suffix: of the output's name.
    """

    name: str
    words: tuple[str, ...]
    source: str
    needs: tuple[str, ...] = ()
    suffix: str = ""

    def action(self, source: str, out: str) -> Callable[[], None]:
        """Return what runs the command on these paths."""
        paths = {_IN: source, _OUT: out}
        return command(*(paths.get(word, word) for word in self.words))


_ESTIMATE = ("estimate", "--estimator", "data-free", *FAST, "-o", _OUT, "--", _IN)
TASKS = (
    Task(name="estimate", words=_ESTIMATE, source="model", suffix=".safetensors"),
    Task(
        name="solve",
        words=("solve", "--budget", "4bpw", "-o", _OUT, "--", _IN),
        source="table.safetensors",
        suffix=".json",
    ),
    Task(
        name="quantize",
        words=("quantize", "--plan", "plan.json", "-o", _OUT, "--", _IN),
        source="model",
        needs=("plan.json",),
    ),
    Task(
        name="convert",
        words=("convert", "--layout", "tiles", "-o", _OUT, "--", _IN),
        source="packed",
    ),
)
_ESTIMATING, _SOLVING, _QUANTIZING, _CONVERTING = TASKS
_PAIRS = (
    (_QUANTIZING, _QUANTIZING),
    (_ESTIMATING, _ESTIMATING),
    (_QUANTIZING, _CONVERTING),
    (_SOLVING, _SOLVING),
)


def run_circumstances(
    name: str, first: int, count: int, seed: int, materials: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield what became of each case.

    Args:
        name: of the circumstance, one of `CIRCUMSTANCES`.
        first: number of the first case.
        count: of cases.
        seed: of what is drawn.
        materials: the sound files.
        scratch: a folder to work in.
    """
    for number in range(first, first + count):
        chance = random.Random(f"{seed} {name} {number}")
        what, faults = CIRCUMSTANCES[name](number, chance, materials, scratch)
        yield {"command": what, "case": number, "faults": faults}


_Found = tuple[str, list[str]]


def _two(number: int, chance: random.Random, materials: Path, scratch: Path) -> _Found:
    """Start two processes that write one output: one right result, and one line."""
    pair = _PAIRS[number % len(_PAIRS)]
    apart = chance.random() * _APART
    sound = [_sound(task, materials, scratch) for task in pair]
    before = _laid_out(pair, materials, scratch)
    out = f"out{pair[0].suffix}"
    both = fork(lambda: _both(pair, out, apart), _LIMITS, folder=scratch)
    ended = json.loads(both.out) if both.status == 0 else []
    faults = _beside(before, scratch, out)
    statuses = [status for status, _ in ended]
    if sorted(statuses) != [0, 2]:
        faults.append(f"the two ended with {statuses}: {ended} {both.err[-200:]}")
    else:
        winner = statuses.index(0)
        lines = [line for line in ended[1 - winner][1].splitlines() if line.strip()]
        if len(lines) != 1 or not lines[0].startswith("bitknap: "):
            faults.append(f"the second says {lines}")
        if _result(scratch / out) != sound[winner]:
            faults.append(f"the result is not that of {pair[winner].name}")
    return f"{pair[0].name} and {pair[1].name}, {apart:.3f} s apart", faults


def _both(pair: tuple[Task, Task], out: str, apart: float) -> None:
    """Run two commands at once, and print how they ended as JSON."""
    reading, writing = os.pipe()
    other = os.fork()
    if other == 0:
        time.sleep(apart)
        ended = fork(pair[1].action(pair[1].source, out), _LIMITS)
        os.write(writing, json.dumps([ended.status, ended.err[-1000:]]).encode())
        os._exit(0)
    ended = fork(pair[0].action(pair[0].source, out), _LIMITS)
    os.waitpid(other, 0)
    print(json.dumps([[ended.status, ended.err[-1000:]], json.loads(os.read(reading, 1 << 16))]))


def _clock(number: int, chance: random.Random, materials: Path, scratch: Path) -> _Found:
    """Let the clock go backwards, and let files be of the future or of 1970."""
    task = TASKS[number % len(TASKS)]
    step, moment = chance.choice((-1.0, -86_400.0, -1e9)), chance.choice((0, 4_102_444_800))

    def run() -> None:
        _turn_back(step)
        task.action(task.source, f"out{task.suffix}")()

    def prepare() -> None:
        for path in (scratch / task.source, *(scratch / task.source).rglob("*")):
            os.utime(path, (moment, moment))

    return f"{task.name}, {step:g} s a call", _alone(task, run, materials, scratch, prepare)


def _turn_back(step: float) -> None:
    """Make every later call of the clock say an earlier time."""
    calls, real = [0], time.time

    def now() -> float:
        calls[0] += 1
        return max(0.0, real() + step * calls[0])

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)


def _read_only(number: int, chance: random.Random, materials: Path, scratch: Path) -> _Found:
    """Let the source lie on a disk that cannot be written."""
    task = TASKS[number % len(TASKS)]

    def run() -> None:
        read_only(Path(task.source))
        task.action(task.source, f"out{task.suffix}")()

    return task.name, _alone(task, run, materials, scratch)


def _locale(number: int, chance: random.Random, materials: Path, scratch: Path) -> _Found:
    """Let the locale be C, where texts are ASCII, and the output's name not."""
    task = TASKS[number % len(TASKS)]
    out = f"{chance.choice(('out', 'ünï-模型', 'é'))}{task.suffix}"

    def run() -> None:
        locale.setlocale(locale.LC_ALL, "C")
        sys.stdout = open(1, "w", encoding="ascii", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="ascii", errors="backslashreplace", closefd=False)  # noqa: SIM115
        task.action(task.source, out)()

    return f"{task.name} to {out!r}", _alone(task, run, materials, scratch, out=out)


def _named(number: int, chance: random.Random, materials: Path, scratch: Path) -> _Found:
    """Give source and output names of all kinds."""
    task, name = TASKS[number % len(TASKS)], _NAMES[number // len(TASKS) % len(_NAMES)]
    source, out = f"{name}.in", f"{name}{task.suffix}"

    def prepare() -> None:
        (scratch / task.source).rename(scratch / source)

    faults = _alone(task, task.action(source, out), materials, scratch, prepare, out=out)
    return f"{task.name} to {out[:40]!r}", faults


def _linked(number: int, chance: random.Random, materials: Path, scratch: Path) -> _Found:
    """Let the source be a link, or a folder of links as in the hub's cache; the output's too."""
    task, way = TASKS[number % len(TASKS)], number // len(TASKS) % 3
    source, out = scratch / task.source, f"out{task.suffix}"
    inside = f"there/{out}" if way == 2 else out

    def prepare() -> None:
        real = scratch / f"real {task.source}"
        source.rename(real)
        if way == 1 and real.is_dir():
            source.mkdir()
            for file in real.iterdir():
                (source / file.name).symlink_to(Path("..", real.name, file.name))
        else:
            source.symlink_to(real.name if way else real)
        (scratch / "there").symlink_to(".")

    faults = _alone(task, task.action(task.source, inside), materials, scratch, prepare, out=out)
    return f"{task.name}, way {way}", faults


def _alone(
    task: Task,
    run: Callable[[], None],
    materials: Path,
    scratch: Path,
    prepare: Callable[[], None] = lambda: None,
    *,
    out: str = "",
) -> list[str]:
    """Run a command and return what is wrong with what it says, wrote or changed."""
    sound = _sound(task, materials, scratch)
    _laid_out((task,), materials, scratch)
    prepare()
    name, before = out or f"out{task.suffix}", snapshot(scratch)
    ended = fork(run, _LIMITS, folder=scratch)
    faults = _beside(before, scratch, name)
    if ended.status != 0:
        return [*faults, f"status {ended.status}: {ended.err[-300:]}"]
    if _result(scratch / name) != sound:
        faults.append("the result is another")
    return faults


def _beside(before: dict[str, str], scratch: Path, out: str) -> list[str]:
    """Return what changed beside an output."""
    lines = difference(before, snapshot(scratch))
    return [line for line in lines if not ours(line.split(": ", 1)[1], out)]


def _sound(task: Task, materials: Path, scratch: Path) -> dict[str, str]:
    """Return the ordinary result of a task, which is made once."""
    kept = scratch.with_name(f"{scratch.name}.sound {task.name}")
    if not kept.exists():
        _laid_out((task,), materials, scratch)
        fork(task.action(task.source, f"out{task.suffix}"), _LIMITS, folder=scratch)
        (scratch / f"out{task.suffix}").rename(kept)
    return _result(kept)


def _result(path: Path) -> dict[str, str]:
    """Return what is at a path, by names below it; a model card, which names the source, apart."""
    if path.is_dir():
        return {name: x for name, x in snapshot(path).items() if name != "README.md"}
    return {"": snapshot(path.parent).get(path.name, "nothing")}


def _laid_out(tasks: tuple[Task, ...], materials: Path, scratch: Path) -> dict[str, str]:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in {name for task in tasks for name in (task.source, *task.needs)}:
        if (materials / name).is_dir():
            shutil.copytree(materials / name, scratch / name)
        else:
            shutil.copyfile(materials / name, scratch / name)
    (scratch / "thesis.txt").write_text("years of work")
    return snapshot(scratch)


CIRCUMSTANCES: dict[str, Callable[[int, random.Random, Path, Path], _Found]] = {
    "two at once": _two,
    "clock backwards": _clock,
    "read-only source": _read_only,
    "locale C": _locale,
    "names": _named,
    "links": _linked,
}
