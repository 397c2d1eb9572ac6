"""The trials of a study: all, the best, and the Pareto front of bytes and loss."""

from __future__ import annotations

from bitknap.allocation.problem.budget import Budget, human
from bitknap.allocation.search.optuna_trials import quietly, reaching
from bitknap.allocation.search.study import Study
from bitknap.allocation.search.trial_record import Record, loss_of, record_of
from bitknap.errors import InfeasibleError, InputError


def records(study: Study) -> list[Record]:
    """Return all trials by number."""
    with quietly(), reaching(study.storage):
        return [record_of(trial) for trial in study.trials.get_trials(deepcopy=False)]


def best(study: Study, budget: str | None = None) -> Record:
    """Return the trial with the lowest measured loss.

    Args:
        study: the study.
        budget: for a study with a range of budgets, the budget of the plan; the widest by default.

    Raises:
        InputError: no trial is complete.
        InfeasibleError: no measured plan is within the budget.
    """
    complete = [record for record in records(study) if record.state == "complete"]
    if not complete:
        raise InputError(f"study {study.name!r} has no complete trial; run it first")
    if budget is not None:
        limit = Budget.parse(budget).limit(study.table)
        least = min(record.nbytes or 0 for record in complete)
        complete = [record for record in complete if (record.nbytes or 0) <= limit.bound]
        if not complete:
            raise InfeasibleError(
                f"budget {budget}: the smallest measured plan takes {human(least)}, limit is "
                f"{human(limit.bound)}{limit.note}; raise the budget or run more trials"
            )
    return min(complete, key=lambda record: (loss_of(record), record.nbytes or 0, record.number))


def front(study: Study) -> list[Record]:
    """Return the Pareto-optimal trials in bytes and loss, sorted by bytes; each plan once."""
    complete = [record for record in records(study) if record.state == "complete"]
    front_trials: list[Record] = []
    for record in sorted(complete, key=lambda r: (r.nbytes or 0, loss_of(r), r.number)):
        if not front_trials or loss_of(record) < loss_of(front_trials[-1]):
            front_trials.append(record)
    return front_trials
