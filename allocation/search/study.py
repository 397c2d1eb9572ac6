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
from bitknap.allocation.problem.profiles import profile
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.search.optuna_trials import (
    PLAN,
    attempts,
    fail_abandoned,
    known_values,
    make_sampler,
    open_storage,
    quietly,
    reaching,
    shown,
    understanding,
)
from bitknap.allocation.search.search_space import Knobs, apply, neutral, signal, suggest
from bitknap.allocation.search.study_checks import ABOUT, MEASURED, check_choices, is_ours
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
        knobs: the knobs that are turned.
    """

    name: str
    storage: str
    trials: optuna.Study
    about: Mapping[str, Any]
    table: CostTable
    signals: Mapping[str, Floats]
    knobs: Knobs

    @property
    def measured(self) -> Mapping[str, Any]:
        """Description of what is measured, JSON values; empty before the first run."""
        stored: Mapping[str, Any] = self.trials.user_attrs.get(MEASURED, {})
        return stored


def create(
    name: str,
    storage: str,
    table: str | Path,
    *,
    features: Sequence[str | Path] = (),
    budget: str | None = None,
    profile_name: str = "gate_eq_up",
    sampler: str = "tpe",
    knobs: Knobs | None = None,
    seed: int = 0,
) -> Study:
    """Create a study and enqueue its first trial, with every knob neutral.

    Args:
        name: name of the study, new in the storage.
        storage: any URL that Optuna accepts, or "journal:PATH".
        table: file of the table to solve.
        features: files of other tables of the same units, for exponents; named by their stems.
        budget: budget of every plan; not allowed with a range of budgets in the knobs.
        profile_name: profile that says which units share a format.
        sampler: "tpe", "cmaes", or "nsga2", which trades bytes against loss.
        knobs: the knobs that may be turned; tilts by layer and projection when not given.
        seed: random seed of the sampler.

    Raises:
        InputError: a value cannot be used, the storage cannot be reached, or the study exists.
        InfeasibleError: no plan is within the budget.
        FileError: a table cannot be read.
    """
    chosen = knobs or Knobs(tilts=("layer", "proj"))
    check_choices(name, budget, sampler, chosen)
    paths = [Path(table), *map(Path, features)]
    about = {
        "table": _named_file(paths[0]),
        "features": [_named_file(path) for path in paths[1:]],
        "budget": None if budget is None else str(Budget.parse(budget)),
        "profile": profile_name,
        "knobs": chosen.to_dict(),
        "sampler": sampler,
        "seed": seed,
    }
    tied, signals = _tables(paths, profile_name)
    about["model"] = str(tied.provenance.get("model", ""))
    starts = _starts(chosen, tied)
    for params in starts:
        _solved(tied, signals, budget, params)
    import optuna

    with quietly():
        opened = open_storage(storage, create=True)
        ways = [optuna.study.StudyDirection.MINIMIZE] * (2 if chosen.budget else 1)
        try:
            with reaching(storage):
                optuna_study = optuna.create_study(
                    study_name=name,
                    storage=opened,
                    directions=ways,
                    sampler=make_sampler(sampler, seed),
                )
                optuna_study.set_user_attr(ABOUT, about)
                for params in starts:
                    optuna_study.enqueue_trial(params)
        except optuna.exceptions.DuplicatedStudyError:
            raise InputError(
                f"study {name!r} exists in {shown(storage)}; run it, or choose another name"
            ) from None
    return Study(
        name=name,
        storage=storage,
        trials=optuna_study,
        about=MappingProxyType(about),
        table=tied,
        signals=signals,
        knobs=chosen,
    )


def load(
    name: str,
    storage: str,
    *,
    table: str | Path | None = None,
    features: Sequence[str | Path] = (),
) -> Study:
    """Return a study from a storage, with its tables.

    Args:
        name: name of the study.
        storage: the URL it was created with.
        table: current path of its table, if it moved.
        features: current paths of its feature tables, in the original order, if they moved.

    Raises:
        InputError: the storage cannot be reached, or has no such study.
        MismatchError: a table is not the one that the study is about.
        FileError: a table cannot be read.
    """
    import optuna

    with quietly():
        opened = open_storage(storage)
        with reaching(storage), understanding(storage):
            try:
                optuna_study = optuna.load_study(study_name=name, storage=opened)
            except KeyError:
                names = ", ".join(map(str, optuna.get_all_study_names(opened))) or "none"
                raise InputError(
                    f"study {name!r} is not in {shown(storage)}; there: {names}"
                ) from None
            ours = is_ours(optuna_study)
    if not ours:
        raise InputError(f"study {name!r} in {shown(storage)} is not of Bitknap; choose another")
    about = optuna_study.user_attrs[ABOUT]
    optuna_study.sampler = make_sampler(about["sampler"], about["seed"])
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
                f"{path}: not the table that study {name!r} is about "
                f"(SHA-256 {entry['sha256'][:12]}…); pass that one, or create a new study"
            )
    tied, signals = _tables(paths, about["profile"], [entry["name"] for entry in kept[1:]])
    return Study(
        name=name,
        storage=storage,
        trials=optuna_study,
        about=MappingProxyType(about),
        table=tied,
        signals=signals,
        knobs=Knobs.from_dict(about["knobs"]),
    )


def run(
    study: Study,
    measure: Callable[[BitPlan], float],
    trials: int,
    *,
    measured: Mapping[str, Any] | None = None,
    watch: Callable[[Record], None] | None = None,
) -> None:
    """Measure `trials` more plans; several processes may do so at once.

    A killed process loses at most its running trial. Equal plans are measured once.

    Args:
        study: from `create` or `load`.
        measure: returns the loss of a plan, a number.
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

    def evaluate(trial: optuna.Trial) -> list[float]:
        params = suggest(trial, study.knobs, study.table)
        plan = plan_of(study, params)
        digest = hashlib.sha256(plan.choice.tobytes()).hexdigest()
        facts = {PLAN: digest, "predicted": plan.header["objective"], "bytes": plan.total_bytes}
        for key, value in (facts | {"bpw": plan.totals["bits_per_weight"]}).items():
            trial.set_user_attr(key, value)
        known = known_values(study.trials)
        if digest in known:
            return known[digest]
        loss = float(measure(plan))
        return [float(plan.total_bytes), loss] if study.knobs.budget else [loss]

    with quietly(), reaching(study.storage):
        _claim(study, dict(measured or {}))
        fail_abandoned(study.trials)
        for trial in attempts(study.trials, evaluate, trials):
            if watch:
                watch(record_of(trial))


def plan_of(study: Study, params: Mapping[str, Any], record: Record | None = None) -> BitPlan:
    """Return the plan for a trial's parameters, the same at every call.

    Args:
        study: the study.
        params: the parameters, such as a record's.
        record: a trial whose number and loss go into the plan's header.

    Raises:
        InfeasibleError: the parameters allow no plan.
    """
    plan = _solved(study.table, study.signals, study.about["budget"], params)
    # Objective and bound refer to the modified costs, but the plan is reported by the study's
    # table.
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
    paths: Sequence[Path], profile_name: str, names: Sequence[str] | None = None
) -> tuple[CostTable, Mapping[str, Floats]]:
    """Return the tied table and the signals of the features."""
    table = CostTable.load(paths[0])
    kept = {**table.provenance, "profile": profile_name}
    tied = replace(table.tie(profile(profile_name)), provenance=kept)
    stems = list(names or [path.stem for path in paths[1:]])
    if len(set(stems)) != len(stems):
        raise InputError(f"features: {', '.join(stems)} has a name twice; rename a file")
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
    table: CostTable, signals: Mapping[str, Floats], budget: str | None, params: Mapping[str, Any]
) -> BitPlan:
    turned = apply(table, params, signals)
    limit = Budget.bits(params["bits"]) if budget is None else Budget.parse(budget)
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
                f"study {study.name!r}: {key} was {before.get(key)!r}, now {measured.get(key)!r}; "
                "losses would not compare; create a new study"
            )
