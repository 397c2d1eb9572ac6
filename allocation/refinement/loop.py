"""The closed loop: measure plans, update the posterior of the costs, solve for better plans.

The sum of a plan's table costs ranks plans well, but misses interactions between units. So the
table's plan is measured first, then others within the same limits: each is the exact optimum for
costs drawn from the posterior (Thompson sampling: Russo et al., arXiv 1707.02038), restricted to a
trust region around the table. A plan replaces the best one only if a paired test over blocks of
text shows a lower loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bitknap.allocation.plans.solution import Answer, Solution, Status
from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.refinement.history import Measure, Rounds, Step, solved
from bitknap.allocation.refinement.proposers import Driver, Thompson, Tilting
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.solving import solve
from bitknap.deprecation import renamed_value
from bitknap.errors import InputError, MismatchError
from bitknap.names import check_name
from bitknap.progress import Progress

__all__ = ["Measure", "Refine", "Refined", "Step"]

EVALUATIONS = 64
# One-sided 5 %.
SURE = 1.645
_DRIVERS = ("posterior", "tpe", "cmaes")
FORMER_DRIVERS = {"belief": "posterior"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """The result of a closed loop.

    Attributes:
        solution: the best plan, checked against all limits; its cost and bound are the table's.
        table: the costs, corrected by the measurements.
        steps: every measured plan, in order.
        best: the step of the best plan.
    """

    solution: Solution
    table: CostTable
    steps: tuple[Step, ...]
    best: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine:
    """A closed loop; also usable as a solver when only its plan is needed.

    Deterministic for a given seed if the measurements are.

    Attributes:
        parts: measures on parts of a text; a plan that is clearly worse on the first parts is not
            run on the rest.
        evaluations: number of plans to measure, at least 1.
        others: other tables of the same units and formats; their plans are measured second.
        driver: how costs are proposed: "posterior" samples their posterior; "tpe" and "cmaes"
            are Optuna's samplers over one tilt per layer and projection.
        sure: gain, in standard errors, that a plan needs to be accepted.
        seed: random seed.
        progress: called with ("refine", done, of).
    """

    parts: tuple[Measure, ...]
    evaluations: int = EVALUATIONS
    others: tuple[CostTable, ...] = ()
    driver: Literal["posterior", "tpe", "cmaes"] = "posterior"
    sure: float = SURE
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError(
                "parts: the list is empty; give a measure of at least one part of a text"
            )
        if whole("evaluations", self.evaluations) < 1:
            raise InputError(
                f"evaluations: {self.evaluations} is below 1, which measures the table's own plan "
                "alone"
            )
        # The dataclass's own __init__ stands between here and the caller.
        driver = renamed_value("driver", self.driver, FORMER_DRIVERS, stacklevel=3)
        object.__setattr__(self, "driver", driver)
        check_name("driver", self.driver, _DRIVERS)
        if not self.sure >= 0:
            raise InputError(f"sure: {self.sure} is below 0; {SURE} is usual")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "refine"

    def answer(self, problem: Problem) -> Answer:
        """Return the best plan found, with the knapsack's bound on the table's cost."""
        start = Knapsack().answer(problem)
        if start.choice is None:
            return start
        rounds = self._rounds(problem, start)
        return _answer(problem, rounds, start)

    def run(self, problem: Problem) -> Refined:
        """Return the best plan found, with the corrected table and all measured plans.

        Raises:
            InfeasibleError: no plan is within the limits.
            MismatchError: another table has other units or formats.
            BitknapError: a plan's loss is not a number.
        """
        start = Knapsack().answer(problem)
        solve(problem, _Known(start))  # raises, with the reason, if there is no plan
        rounds = self._rounds(problem, start)
        solution = solve(problem, _Known(_answer(problem, rounds, start)))
        said = {**problem.table.provenance, "refined": len(rounds.steps)}
        cost = problem.table.cost * rounds.posterior().mean()
        return Refined(
            solution=solution,
            table=replace(problem.table, cost=cost, provenance=said),
            steps=tuple(rounds.steps),
            best=rounds.best or rounds.steps[0],
        )

    def _rounds(self, problem: Problem, start: Answer) -> Rounds:
        rounds = Rounds(problem=problem, parts=self.parts, sure=self.sure)
        rounds.take("table", problem.expand(np.asarray(start.choice)))
        for table in self.others:
            choice = solved(problem, _cost_of_other(problem.table, table))
            if choice is not None and rounds.new(choice) and len(rounds.steps) < self.evaluations:
                rounds.take("other table", choice)
        driver: Driver
        driver = (
            Thompson(self.seed) if self.driver == "posterior" else Tilting(self.driver, self.seed)
        )
        while (left := self.evaluations - len(rounds.steps)) > 0:
            if self.progress:
                self.progress("refine", len(rounds.steps), self.evaluations)
            proposal = driver.propose(rounds, left)
            if proposal is None:
                break
            driver.learn(rounds.take(*proposal))
        return rounds


@dataclass(frozen=True, slots=True)
class _Known:
    """A solver that has its answer already."""

    known: Answer
    name: str = "refine"

    def answer(self, problem: Problem) -> Answer:
        return self.known


def _answer(problem: Problem, rounds: Rounds, start: Answer) -> Answer:
    best = rounds.best or rounds.steps[0]
    choice = best.choice[np.unique(problem.row_of, return_index=True)[1]]
    same = best is rounds.steps[0]
    return Answer(
        choice=choice, bound=start.bound, status=start.status if same else Status.FEASIBLE
    )


def _cost_of_other(ours: CostTable, other: CostTable) -> np.ndarray:
    if not other.units.same_as(ours.units) or other.formats != ours.formats:
        raise MismatchError(
            "others: a table has other units or formats; estimate it on the same model with the "
            "same formats"
        )
    return np.where(np.isfinite(ours.cost), other.cost, np.inf)
