"""Search around the knapsack's plan, for losses that are not sums over units."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Ints, Longs
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.search.attempts import attempt
from bitknap.allocation.search.optuna_trials import (
    PLAN,
    REASON,
    fail_abandoned,
    known_values,
    make_sampler,
    open_storage,
    quietly,
    reaching,
    shown,
)
from bitknap.allocation.search.search_space import GROUPS, check_groups, check_width, groups
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.errors import BitknapError, InfeasibleError, InputError, MismatchError
from bitknap.names import check_name
from bitknap.progress import Progress

if TYPE_CHECKING:
    import optuna

# Attribute of a stored study that identifies its problem.
_PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Tilt the costs of groups of rows, solve exactly again, keep the best plan by the objective.

    Every candidate is the knapsack's plan for cost * exp(tilt), so it is within all limits. The
    first candidate is the untilted plan, so the result is never worse by the objective. Equal plans
    are measured once. Deterministic for a given seed if `Knapsack` and the objective are.

    Attributes:
        objective: loss of a plan from the choice of each unit, int32[U]; the table's own cost when
            not given.
        trials: number of candidates to try.
        sampler: "cmaes" or "tpe".
        width: tilts go from -width to width.
        groups: columns of the units ("layer", "role", "expert", "proj") that define groups; tied
            units belong to the group of the first one.
        seed: random seed of the sampler.
        storage: an Optuna storage URL that keeps trials for resuming; in memory if not given.
        study: name of the study in the storage.
        progress: called with (what, done, of).
    """

    objective: Callable[[Ints], float] | None = None
    trials: int = 200
    sampler: Literal["cmaes", "tpe"] = "cmaes"
    width: float = 1.0
    groups: tuple[str, ...] = GROUPS
    seed: int = 0
    storage: str | None = None
    study: str = "search"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"trials: {self.trials} must be at least 1")
        check_name("sampler", self.sampler, ("cmaes", "tpe"))
        if not self.groups:
            raise InputError("groups: name at least one column, such as 'layer'")
        check_groups(self.groups)
        check_width(self.width)

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "search"

    def answer(self, problem: Problem) -> Answer:
        """Return the candidate with the least objective, and the knapsack's bound on the cost.

        Raises:
            BitknapError: the objective was not a number for any candidate.
            MismatchError: the stored study is about another problem.
        """
        start = Knapsack().answer(problem)
        if start.choice is None:
            return start
        reached = reaching(self.storage) if self.storage else contextlib.nullcontext()
        with quietly(), reached:
            choice = self._best(problem, np.asarray(start.choice))
        same = np.array_equal(choice, start.choice)
        return Answer(
            choice=choice, bound=start.bound, status=start.status if same else Status.FEASIBLE
        )

    def _best(self, problem: Problem, start: Longs) -> Longs:
        label, names = groups(problem.table, self.groups)
        of_row = label[np.unique(problem.row_of, return_index=True)[1]]

        def candidate(tilts: list[float]) -> Longs:
            return _tilted(problem, np.array(tilts)[of_row]) if any(tilts) else start

        study = self._study(problem, names)
        known = known_values(study)
        # Only the best plan is kept: a million rows times all trials would fill memory.
        least, best, latest = np.inf, start, start

        def evaluate(trial: optuna.Trial) -> list[float]:
            nonlocal latest
            latest = candidate([trial.suggest_float(n, -self.width, self.width) for n in names])
            digest = hashlib.sha256(latest.astype(np.int64).tobytes()).hexdigest()
            trial.set_user_attr(PLAN, digest)
            if digest not in known:
                known[digest] = [self._measured(problem, latest)]
            return known[digest]

        for done in range(self.trials):
            if self.progress:
                self.progress("search", done, self.trials)
            trial = attempt(study, evaluate)
            if trial.values and trial.values[0] < least:
                least, best = trial.values[0], latest
        winner = _winner(study)
        if winner.values[0] == least:
            return best
        return candidate([winner.params[name] for name in names])

    def _measured(self, problem: Problem, choice: Longs) -> float:
        if self.objective is None:
            return float(problem.cost[np.arange(len(choice)), choice].sum())
        return float(self.objective(problem.expand(choice)))

    def _study(self, problem: Problem, names: tuple[str, ...]) -> optuna.Study:
        """Return the study to continue; a new one starts with the untilted plan."""
        import optuna

        sampler = make_sampler(self.sampler, self.seed)
        neutral = dict.fromkeys(names, 0.0)
        if self.storage is None:
            study = optuna.create_study(study_name=self.study, sampler=sampler)
            study.enqueue_trial(neutral)
            return study
        about = _fingerprint(problem, names, self.width)
        storage = open_storage(self.storage, create=True)
        study = optuna.create_study(
            study_name=self.study, storage=storage, sampler=sampler, load_if_exists=True
        )
        stored = study.user_attrs.get(_PROBLEM)
        if stored is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(_PROBLEM, about)
            study.enqueue_trial(neutral)
        elif stored != about:
            raise MismatchError(
                f"study {self.study!r} in {shown(self.storage)} belongs to another problem; "
                "choose another name"
            )
        fail_abandoned(study)
        return study


def _winner(study: optuna.Study) -> optuna.trial.FrozenTrial:
    from optuna.trial import TrialState

    every = study.get_trials(deepcopy=False)
    complete = [trial for trial in every if trial.state == TrialState.COMPLETE]
    if not complete:
        reason = every[-1].user_attrs.get(REASON, "no reason was given")
        raise BitknapError(
            f"search: all {len(every)} trials failed, the last because {reason}; "
            "return a number from the objective"
        )
    return min(complete, key=lambda trial: (trial.values[0], trial.number))


def _tilted(problem: Problem, tilt: Floats) -> Longs:
    """Return the knapsack's choice of each row for cost * exp(tilt), tilt float64[R]."""
    other = copy.copy(problem)
    object.__setattr__(other, "cost", problem.cost * np.exp(tilt)[:, None])
    choice = Knapsack().answer(other).choice
    if choice is None:
        # With several limits HiGHS may run out of time; the search goes on.
        raise InfeasibleError("the knapsack found no plan for the tilted costs in its time")
    return np.asarray(choice)


def _fingerprint(problem: Problem, names: tuple[str, ...], width: float) -> str:
    digest = hashlib.sha256(repr((names, width)).encode())
    for array in (problem.cost, problem.weights, problem.bounds, problem.row_of):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
