"""What a killed worker of a study may lose: the trial that was running, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitknap.allocation import BitPlan
from bitknap.benchmarks.robustness.commands import TRIALS, Long
from bitknap.benchmarks.robustness.forked import Ended, Limits, command, fork

# A dead worker's lock of the journal is broken after so many seconds, instead of Optuna's 30.
_GRACE = 3


class Trial(NamedTuple):
    """A trial as the storage has it; `plan` is SHA-256 of the plan's choices."""

    number: int
    state: str
    params: dict[str, Any]
    values: list[float] | None
    plan: str | None


Trials = Sequence[Trial]


def trials_of(long: Long, folder: Path, limits: Limits) -> Trials:
    """Return the trials of the study that a command goes on with.

    Raises:
        ValueError: the storage cannot be read; the text is what was said of it.
    """

    def show() -> None:
        from bitknap.allocation.search.study import load

        _impatient()
        found = load("s", long.storage, table=folder / "table.safetensors")
        rows = [
            [t.number, t.state.name, t.params, t.values, t.user_attrs.get("plan")]
            for t in found.trials.get_trials()
        ]
        print(json.dumps(rows))

    ended = fork(show, limits, folder=folder)
    if ended.status != 0:
        raise ValueError(" ".join(ended.err.split())[-300:])
    return [Trial(*row) for row in json.loads(ended.out)]


def judged_study(
    long: Long, killed: Ended, whole: Trials, folder: Path, limits: Limits
) -> list[str]:
    """Look at what a kill left of a study, run what is left of it, and return what is wrong.

    Args:
        long: the command.
        killed: how the killed run ended; its output names finished trials.
        whole: the trials of a run that nobody killed.
        folder: that it ran in.
        limits: limits of every other run.
    """
    file = folder / long.out
    try:
        kept = trials_of(long, folder, limits)
    except ValueError as error:
        return [f"after the kill: the study cannot be read: {error}"]
    content = file.read_bytes()
    done = _complete(kept)
    shown = {int(number) for number in re.findall(r"^trial (\d+): loss", killed.out, re.MULTILINE)}
    faults = [f"trial {number} was shown and is lost" for number in sorted(shown - set(done))]
    if sum(trial.state == "RUNNING" for trial in kept) > 1:
        faults.append("more than one trial is left running")
    faults += _unlike("after the kill", kept, whole)
    left = TRIALS - len(done)
    if left:
        words = list(long.words)
        words[words.index("--trials") + 1] = str(left)
        ended = fork(_impatiently(*words), limits, folder=folder)
        if ended.status != 0:
            faults.append(f"the repeated run ended with {ended.status}: {ended.err[-200:]}")
    try:
        after = trials_of(long, folder, limits)
    except ValueError as error:
        return [*faults, f"after the repeated run: the study cannot be read: {error}"]
    if len(_complete(after)) != TRIALS:
        faults.append(f"after the repeated run: {len(_complete(after))} complete, not {TRIALS}")
    faults += [
        f"after the repeated run: trial {one.number} is another"
        for one, other in zip(kept, after, strict=False)
        if one.state == "COMPLETE" and one != other
    ]
    if long.storage.startswith("journal:") and not file.read_bytes().startswith(content):
        faults.append("after the repeated run: lines of the journal changed")
    return faults + _unlike("after the repeated run", after, whole) + _best(long, folder, limits)


def _complete(trials: Trials) -> dict[int, Trial]:
    return {trial.number: trial for trial in trials if trial.state == "COMPLETE"}


def _unlike(when: str, trials: Trials, whole: Trials) -> list[str]:
    """Return the trials that differ from those of a run that nobody killed.

    What a trial draws depends on the seed, its number and the trials before: up to the first one
    that was lost, all are the same.
    """
    found = []
    for one, other in zip(trials, whole, strict=False):
        if one.state in ("RUNNING", "FAIL"):
            break
        if one.state == "COMPLETE" and one != other:
            found.append(f"{when}: trial {one.number} is not that of a run nobody killed")
    return found


def _best(long: Long, folder: Path, limits: Limits) -> list[str]:
    """Return what is wrong with the best trial: its plan is the one that its parameters give."""
    plan = folder / f"{long.out}.best.json"
    words = ("study", "best", "s", *long.words[3:7], "-o", plan.name, "--json")
    ended = fork(_impatiently(*words), limits, folder=folder)
    if ended.status != 0:
        return [f"study best ended with {ended.status}: {ended.err[-200:]}"]
    choice = BitPlan.load(plan).choice
    measured = [trial for trial in trials_of(long, folder, limits) if trial.values]
    least = min(measured, key=lambda trial: trial.values or [])
    if least.plan != hashlib.sha256(choice.tobytes()).hexdigest():
        return ["study best is not the plan of the least loss"]
    return []


def _impatiently(*words: str) -> Any:
    def run() -> None:
        _impatient()
        command(*words)()

    return run


def _impatient() -> None:
    from optuna.storages.journal import JournalFileOpenLock

    JournalFileOpenLock.__init__.__defaults__ = (_GRACE,)
