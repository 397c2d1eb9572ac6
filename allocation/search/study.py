"""Studies: many measured plans of one table, shared by workers through an Optuna storage.

A trial turns the knobs, solves the modified table exactly, and measures the plan; so its parameters
alone determine a plan. The inputs of a study are recorded in it, and running it with different
inputs is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.profiles import Profile
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.search.attempts import attempts
from bitknap.allocation.search.optuna_trials import (
    PLAN,
    fail_abandoned,
    known_values,
    open_storage,
    quietly,
    reaching,
    shown,
    understanding,
)
from bitknap.allocation.search.search_space import Knobs, apply, neutral, signal, suggest
from bitknap.allocation.search.study_checks import ABOUT, MEASURED, is_ours
from bitknap.allocation.search.study_design import Design
from bitknap.allocation.search.trial_record import Record, record_of
from bitknap.allocation.solvers.solving import solve
from bitknap.errors import FileError, InputError, MismatchError

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Study:
    """A study in a storage, and the tables it is about.

    Attributes:
        name: its name in the storage.
        storage: the storage's URL.
        trials: Optuna's own study.
        about: the recorded inputs, JSON values: "table" and "features" with their SHA-256,
            "budget", "profile", "knobs", "sampler", "seed", "model".
        table: the table, units tied as the profile says.
        signals: `signal` of each feature table, by name.
        design: how it searches.
    """

    name: str
    storage: str
    trials: optuna.Study
    about: Mapping[str, Any]
    table: CostTable
    signals: Mapping[str, Floats]
    design: Design

    @property
    def knobs(self) -> Knobs:
        """What is turned."""
        return self.design.knobs

    @property
    def measured(self) -> Mapping[str, Any]:
        """Description of what is measured, JSON values; empty before the first run."""
        stored: Mapping[str, Any] = self.trials.user_attrs.get(MEASURED, {})
        return stored


def create(
    name: str,
    storage: str,
    table: str | Path,
    design: Design,
    *,
    features: Sequence[str | Path] = (),
) -> Study:
    """Create a study and enqueue its first trial, with every knob neutral.

    Args:
        name: Name of the study, new in the storage.
        storage: Any URL that Optuna knows, or "journal:PATH".
        table: File of the table to solve.
        design: What every plan keeps, and how the study searches.
        features: Files of other tables of the same units, for exponents; named by their stems.

    Raises:
        InputError: A value cannot be used, the storage cannot be reached, or the study exists.
        InfeasibleError: No plan keeps the budget.
        FileError: A table cannot be read.
    """
    if not name.strip():
        raise InputError("study: the name is empty")
    paths = [Path(table), *map(Path, features)]
    about = {
        "table": _named_file(paths[0]),
        "features": [_named_file(path) for path in paths[1:]],
        **design.to_dict(),
    }
    tied, signals = _tables(paths, design.profile)
    about["model"] = str(tied.provenance.get("model", ""))
    starts = _starts(design.knobs, tied)
    for params in starts:
        _solved(tied, signals, design.budget, params)
    return Study(
        name=name,
        storage=storage,
        trials=_created(name, storage, design, about, starts),
        about=MappingProxyType(about),
        table=tied,
        signals=signals,
        design=design,
    )


def _created(
    name: str,
    storage: str,
    design: Design,
    about: dict[str, Any],
    starts: Sequence[dict[str, Any]],
) -> optuna.Study:
    """Return a new study of Optuna's, whose first trials are enqueued."""
    import optuna

    with quietly():
        opened = open_storage(storage, create=True)
        ways = [optuna.study.StudyDirection.MINIMIZE] * (2 if design.knobs.budget else 1)
        try:
            with reaching(storage):
                made = optuna.create_study(
                    study_name=name,
                    storage=opened,
                    directions=ways,
                    sampler=design.sampler.make(),
                )
                made.set_user_attr(ABOUT, about)
                for params in starts:
                    made.enqueue_trial(params)
        except optuna.exceptions.DuplicatedStudyError:
            raise InputError(
                f"study {name!r} exists in {shown(storage)}; run it, or choose another name"
            ) from None
    return made


def load(
    name: str,
    storage: str,
    *,
    table: str | Path | None = None,
    features: Sequence[str | Path] = (),
) -> Study:
    """Return a study from a storage, with its tables.

    Args:
        name: Name of the study.
        storage: The URL it was created with.
        table: Where its table lies now, if it moved.
        features: Where its feature tables lie now, in their first order, if they moved.

    Raises:
        InputError: The storage cannot be reached, or has no such study.
        MismatchError: A table is not the one that the study is about.
        FileError: A table cannot be read.
    """
    trials = _stored(name, storage)
    about = trials.user_attrs[ABOUT]
    design = Design.from_dict(about)
    trials.sampler = design.sampler.make()
    kept = [about["table"], *about["features"]]
    paths = [Path(entry["path"]) for entry in kept]
    if table is not None:
        paths[0] = Path(table)
    if features:
        paths[1:] = [Path(path) for path in features]
    if len(paths) != len(kept):
        raise InputError(f"study {name!r} has {len(kept) - 1} features, {len(paths) - 1} given")
    for path, entry in zip(paths, kept, strict=True):
        if _digest(path) != entry["sha256"]:
            raise MismatchError(
                f"{path}: not the table that study {name!r} was created with (SHA-256 "
                f"{entry['sha256'][:12]}…); pass that one, or create a new study"
            )
    tied, signals = _tables(paths, design.profile, [entry["name"] for entry in kept[1:]])
    return Study(
        name=name,
        storage=storage,
        trials=trials,
        about=MappingProxyType(about),
        table=tied,
        signals=signals,
        design=design,
    )


def _stored(name: str, storage: str) -> optuna.Study:
    """Return Optuna's study of a storage, if it is one of ours."""
    import optuna

    with quietly():
        opened = open_storage(storage)
        with reaching(storage), understanding(storage):
            try:
                trials = optuna.load_study(study_name=name, storage=opened)
            except KeyError:
                names = ", ".join(map(str, optuna.get_all_study_names(opened))) or "none"
                raise InputError(
                    f"study {name!r} is not in {shown(storage)}; there: {names}"
                ) from None
            ours = is_ours(trials)
    if not ours:
        raise InputError(
            f"study {name!r} in {shown(storage)} was not created by Bitknap; choose another name"
        )
    return trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Measures several plans together, which a model larger than memory does faster.

    Attributes:
        measure: returns the loss of each of some plans, a number.
        count: maximum number of plans.
    """

    measure: Callable[[Sequence[BitPlan]], Sequence[float]]
    count: int


def run(
    study: Study,
    measure: Callable[[BitPlan], float] | Together,
    trials: int,
    *,
    measured: Mapping[str, Any] | None = None,
    watch: Callable[[Record], None] | None = None,
) -> None:
    """Measure `trials` more plans; several processes may do so at once.

    A killed process loses at most its running trials. Equal plans are measured once.

    Args:
        study: from `create` or `load`.
        measure: returns the loss of a plan, a number, or measures several plans together.
        trials: number of trials for this process to complete.
        measured: description of what is measured, such as model and text, JSON values; the first
            run records it.
        watch: called with each finished trial.

    Raises:
        MismatchError: earlier runs of the study measured something else.
        InputError: the storage can no longer be reached.
        BitknapError: 50 trials in a row failed.
    """
    if trials < 1:
        raise InputError(f"trials: {trials} must be at least 1")

    many = measure if isinstance(measure, Together) else Together(measure=_each(measure), count=1)

    def planned(trial: optuna.Trial) -> tuple[str, BitPlan]:
        params = suggest(trial, study.knobs, study.table)
        plan = plan_of(study, params)
        digest = hashlib.sha256(plan.choice.tobytes()).hexdigest()
        facts = {PLAN: digest, "predicted": plan.header["objective"], "bytes": plan.total_bytes}
        for key, value in (facts | {"bpw": plan.totals["bits_per_weight"]}).items():
            trial.set_user_attr(key, value)
        return digest, plan

    def values(trials: Sequence[tuple[str, BitPlan]]) -> list[list[float]]:
        known, plans = known_values(study.trials), dict(trials)
        left = [digest for digest in plans if digest not in known]
        losses = many.measure([plans[digest] for digest in left]) if left else []
        for digest, loss in zip(left, losses, strict=True):
            size = [float(plans[digest].total_bytes)] if study.knobs.budget else []
            known[digest] = [*size, float(loss)]
        return [known[digest] for digest, _ in trials]

    with quietly(), reaching(study.storage):
        _claim(study, dict(measured or {}))
        fail_abandoned(study.trials)
        for trial in attempts(study.trials, planned, values, trials, together=many.count):
            if watch:
                watch(record_of(trial))


def _each(
    measure: Callable[[BitPlan], float],
) -> Callable[[Sequence[BitPlan]], Sequence[float]]:
    return lambda plans: [measure(plan) for plan in plans]


def plan_of(study: Study, params: Mapping[str, Any], record: Record | None = None) -> BitPlan:
    """Return the plan for a trial's parameters, the same at every call.

    Args:
        study: the study.
        params: the parameters, such as a record's.
        record: a trial whose number and loss go into the plan's header.

    Raises:
        InfeasibleError: the parameters allow no plan.
    """
    plan = _solved(study.table, study.signals, study.design.budget, params)
    # Objective and bound are those of the turned costs; what counts is the study's own table.
    header = {key: value for key, value in plan.header.items() if key != "bound"}
    cost = study.table.cost[np.arange(len(plan.choice)), plan.choice].sum()
    header |= {"objective": float(cost), "study": study.name, "params": dict(params)}
    if record is not None:
        header |= {"trial": record.number, "measured": {"loss": record.loss, **study.measured}}
    return replace(plan, header=header)


def _named_file(path: Path) -> dict[str, str]:
    return {"name": path.stem, "path": str(path.absolute()), "sha256": _digest(path)}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None


def _tables(
    paths: Sequence[Path], ties: Profile, names: Sequence[str] | None = None
) -> tuple[CostTable, Mapping[str, Floats]]:
    """Return the tied table and the signals of the features."""
    table = CostTable.load(paths[0])
    kept = {**table.provenance, "profile": ties.name}
    tied = replace(table.tie(ties), provenance=kept)
    stems = list(names or [path.stem for path in paths[1:]])
    if len(set(stems)) != len(stems):
        raise InputError(f"features: {', '.join(stems)}: two files have the same name; rename one")
    signals = {
        stem: signal(table, CostTable.load(path), stem)
        for stem, path in zip(stems, paths[1:], strict=True)
    }
    return tied, MappingProxyType(signals)


def _starts(knobs: Knobs, table: CostTable) -> list[dict[str, Any]]:
    """Return the first trials: neutral knobs, and for a range of budgets also both ends."""
    first = neutral(knobs, table)
    return [first, *({**first, "bits": bits} for bits in knobs.budget or ())]


def _solved(
    table: CostTable,
    signals: Mapping[str, Floats],
    budget: Budget | None,
    params: Mapping[str, Any],
) -> BitPlan:
    turned = apply(table, params, signals)
    limit = Budget.bits(params["bits"]) if budget is None else budget
    return solve(Problem(turned, limit)).plan


def _claim(study: Study, measured: dict[str, Any]) -> None:
    """Record what is measured, or refuse if earlier runs measured something else."""
    before = study.trials.user_attrs.get(MEASURED)
    if before is None:
        study.trials.set_user_attr(MEASURED, measured)
        return
    for key in {**measured, **before}:
        if before.get(key) != measured.get(key):
            raise MismatchError(
                f"study {study.name!r}: {key} was {before.get(key)!r}, now {measured.get(key)!r}, "
                "so losses would not be comparable; create a new study"
            )
