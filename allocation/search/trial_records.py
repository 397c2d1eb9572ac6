"""What became of a study's trials: records, the best of them, and the front of size and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from bitknap.allocation.problem.budget import Budget, human
from bitknap.allocation.search.optuna_trials import REASON, quietly, reaching
from bitknap.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    import optuna

    from bitknap.allocation.search.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One trial as it ended, or as it stands.

    Attributes:
        number: the trial's number.
        state: "complete", "failed", "pruned", "running" or "waiting".
        loss: the measured loss, or None.
        predicted: cost of its plan by the study's table, nats per token, or None.
        nbytes: bytes of its plan, or None.
        bpw: bits per weight of its plan, or None.
        params: value of each parameter.
        reason: why it failed, or "".
        seconds: how long it took, or None.
    """

    number: int
    state: str
    loss: float | None
    predicted: float | None
    nbytes: int | None
    bpw: float | None
    params: Mapping[str, Any]
    reason: str
    seconds: float | None


def records(study: Study) -> list[Record]:
    """Return all trials by number."""
    with quietly(), reaching(study.storage):
        return [record_of(trial) for trial in study.trials.get_trials(deepcopy=False)]


def best(study: Study, budget: str | None = None) -> Record:
    """Return the trial of the least measured loss.

    Args:
        study: the study.
        budget: with a range of budgets, what its plan must keep; the widest when not given.

    Raises:
        InputError: no trial is complete.
        InfeasibleError: no measured plan keeps the budget.
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
    return min(complete, key=lambda record: (_loss(record), record.nbytes or 0, record.number))


def front(study: Study) -> list[Record]:
    """Return the trials that no other one beats in bytes and in loss, by bytes; each plan once."""
    complete = [record for record in records(study) if record.state == "complete"]
    found: list[Record] = []
    for record in sorted(complete, key=lambda r: (r.nbytes or 0, _loss(r), r.number)):
        if not found or _loss(record) < _loss(found[-1]):
            found.append(record)
    return found


def record_of(trial: optuna.trial.FrozenTrial) -> Record:
    """Return what a trial says."""
    states = {"complete": "complete", "fail": "failed", "pruned": "pruned", "waiting": "waiting"}
    state = states.get(trial.state.name.lower(), "running")
    facts = trial.user_attrs
    lost = "its worker was killed" if state == "failed" else ""
    return Record(
        number=trial.number,
        state=state,
        loss=trial.values[-1] if state == "complete" else None,
        predicted=facts.get("predicted"),
        nbytes=facts.get("bytes"),
        bpw=facts.get("bpw"),
        params=MappingProxyType(dict(trial.params)),
        reason=facts.get(REASON, lost),
        seconds=trial.duration.total_seconds() if trial.duration else None,
    )


def _loss(record: Record) -> float:
    return np.inf if record.loss is None else record.loss
