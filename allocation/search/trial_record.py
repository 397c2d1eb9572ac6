"""One trial of a study, finished or in its current state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from bitknap.allocation.search.optuna_trials import REASON

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One trial, finished or in its current state.

    Attributes:
        number: the trial's number.
        state: "complete", "failed", "pruned", "running" or "waiting".
        loss: the measured loss, or None.
        predicted: cost of its plan according to the study's table, nats per token, or None.
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


def record_of(trial: optuna.trial.FrozenTrial) -> Record:
    """Return the record of a trial."""
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


def loss_of(record: Record) -> float:
    """Return the measured loss, infinite when there is none."""
    return np.inf if record.loss is None else record.loss
