"""Trials from asking to reporting: one at a time, or several that are measured together.

A trial without a plan is pruned, and a value that is not a number fails it, with the reason; any
other error fails it and is raised again. SQLite does not lock rows, so two workers may take the
same waiting trial: the last to sign it owns it, and the other must run another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from bitknap.allocation.search.optuna_trials import REASON, WORKER, first_line, worker
from bitknap.errors import BitknapError, InfeasibleError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Planned = TypeVar("Planned")
Values = Sequence[float]


def attempt(study: optuna.Study, evaluate: Callable[[optuna.Trial], Values]) -> FrozenTrial:
    """Ask for a trial, evaluate it, report the result, and return the finished trial."""
    while not (ended := attempt_together(study, evaluate, list, 1)):
        pass  # another worker took it
    return ended[0]


def attempt_together(
    study: optuna.Study,
    plan: Callable[[optuna.Trial], Planned],
    measure: Callable[[Sequence[Planned]], Sequence[Values]],
    count: int,
) -> list[FrozenTrial]:
    """Ask for trials, measure them together, report the results, and return the finished trials.

    Those that another worker took are left out.

    Args:
        study: the study.
        plan: returns what is to be measured in a trial.
        measure: returns the values of each.
        count: number of trials.
    """
    ended: list[FrozenTrial] = []
    planned: list[tuple[optuna.Trial, Planned]] = []
    for _ in range(count):
        trial = study.ask()
        with _failing([trial, *(one for one, _ in planned)], study):
            try:
                trial.set_user_attr(WORKER, worker())
                planned.append((trial, plan(trial)))
            except InfeasibleError as error:
                if _owns(study, trial):
                    ended.append(_ended(study, trial, "PRUNED", str(error)))
            except _taken():
                pass
    if not planned:
        return ended
    with _failing([one for one, _ in planned], study):
        found = measure([what for _, what in planned])
    for (trial, _), values in zip(planned, found, strict=True):
        if _owns(study, trial):
            ended.append(_told(study, trial, list(values)))
    return ended


def attempts(
    study: optuna.Study,
    plan: Callable[[optuna.Trial], Planned],
    measure: Callable[[Sequence[Planned]], Sequence[Values]],
    trials: int,
    *,
    together: int = 1,
    patience: int = 50,
) -> Iterator[FrozenTrial]:
    """Yield finished trials until `trials` of them are complete.

    Args:
        study: the study.
        plan: returns what is to be measured in a trial.
        measure: returns the values of each of some trials.
        trials: number of trials to complete.
        together: number of trials that are measured together.
        patience: number of trials in a row that may fail.

    Raises:
        BitknapError: `patience` trials in a row failed.
    """
    from optuna.trial import TrialState

    done = failed = 0
    while done < trials:
        for trial in attempt_together(study, plan, measure, min(together, trials - done)):
            complete = trial.state == TrialState.COMPLETE
            done, failed = done + complete, 0 if complete else failed + 1
            yield trial
            if failed >= patience:
                raise BitknapError(
                    f"study {study.study_name!r}: {failed} trials in a row failed, the last with "
                    f"{trial.user_attrs.get(REASON, 'no reason')!r}; widen the budget or the knobs"
                )


@contextlib.contextmanager
def _failing(trials: Sequence[optuna.Trial], study: optuna.Study) -> Iterator[None]:
    """Fail trials if an error leaves the block, and raise it again."""
    try:
        yield
    except BaseException as error:
        reason = ": ".join(dict.fromkeys([type(error).__name__, first_line(error)]))
        for trial in trials:
            if _owns(study, trial):
                _ended(study, trial, "FAIL", reason)
        raise


def _told(study: optuna.Study, trial: optuna.Trial, values: list[float]) -> FrozenTrial:
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        return _ended(study, trial, "FAIL", f"the objective is {wrong[0]}")
    return study.tell(trial, values)


def _ended(study: optuna.Study, trial: optuna.Trial, state: str, reason: str) -> FrozenTrial:
    from optuna.trial import TrialState

    trial.set_user_attr(REASON, reason)
    return study.tell(trial, state=TrialState[state], skip_if_finished=True)


def _owns(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Return whether a trial is still this worker's to report."""
    seen = study.get_trials(deepcopy=False)[trial.number]
    return not seen.state.is_finished() and seen.user_attrs.get(WORKER) == worker()


def _taken() -> type[Exception]:
    """Return the error of a trial that another worker has finished."""
    from optuna.exceptions import UpdateFinishedTrialError

    return UpdateFinishedTrialError
