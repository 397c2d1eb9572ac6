"""The problem as an integer linear program, modelled in PuLP, solved by HiGHS or CBC.

The model is built from arrays and holds only the core: options whose reduced costs at the dual
optimum allow a better plan. So extra linear limits cost little, and a million units make a program
of hundreds of columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from bitknap.allocation.plans.solution import Answer
from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.integer_program import TOLERANCE, Program, Result, Runner
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.many_limits import answer
from bitknap.errors import BitknapError, InputError
from bitknap.names import check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Ilp:
    """Branch and cut on the core of the problem; any linear limits.

    With one limit it starts from the knapsack's plan, so that its core holds exactly the options
    that could improve that plan.

    Attributes:
        backend: "highs", "cbc" (comes with PuLP), or "auto": HiGHS when it is installed.
        gap: relative gap at which to stop; 0 proves the optimum within float precision.
        time_limit: seconds.
    """

    backend: Literal["auto", "highs", "cbc"] = "auto"
    gap: float = 0.0
    time_limit: float = 60.0

    def __post_init__(self) -> None:
        check_name("backend", self.backend, ("auto", "highs", "cbc"))
        if not 0 <= self.gap < 1:
            raise InputError(f"gap: {self.gap} is not a share of at least 0 and below 1")
        if not self.time_limit > 0:
            raise InputError(f"time_limit: {self.time_limit} must be above 0")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return f"ilp-{self._chosen}"

    @property
    def _chosen(self) -> str:
        if self.backend == "auto":
            return "highs" if find_spec("highspy") else "cbc"
        return self.backend

    def answer(self, problem: Problem) -> Answer:
        """Return the best choice found and a bound.

        Raises:
            BitknapError: the backend is not installed.
        """
        finite = np.isfinite(problem.bounds)
        if not finite.any():
            return Knapsack().answer(problem)
        start: Longs | None = None
        if finite.sum() == 1:
            start = Knapsack(time_limit=self.time_limit).answer(problem).choice  # type: ignore[assignment]
        return answer(
            problem.cost,
            problem.weights[finite],
            problem.bounds[finite],
            _RUNNERS[self._chosen],
            gap=self.gap,
            time_limit=self.time_limit,
            start=start,
        )


def _modelled(program: Program) -> tuple[Any, list[Any]]:
    """Return the PuLP model and its variables, one per option, set to the program's start."""
    import pulp

    model = pulp.LpProblem("bits", pulp.LpMinimize)
    # PuLP 3.3 creates variables through the model; older versions have only the class.
    variable = getattr(model, "add_variable", pulp.LpVariable)
    picks = [variable(f"x{i}", cat=pulp.LpBinary) for i in range(len(program.cost))]
    for pick, begun in zip(picks, program.start.tolist(), strict=True):
        pick.setInitialValue(int(begun))

    def weighed(values: Any, columns: Any) -> Any:
        pairs = zip(columns.tolist(), values.tolist(), strict=True)
        return pulp.LpAffineExpression([(picks[c], v) for c, v in pairs])

    model += weighed(program.cost, np.arange(len(picks)))
    order = np.argsort(program.row, kind="stable")
    for columns in np.split(order, np.flatnonzero(np.diff(program.row[order])) + 1):
        model += weighed(np.ones(len(columns)), columns) == 1
    for weight, bound in zip(program.weights, program.bounds.tolist(), strict=True):
        columns = np.flatnonzero(weight)
        if len(columns):
            model += weighed(weight[columns], columns) <= bound
    return model, picks


def _options(gap: float, seconds: float) -> dict[str, Any]:
    """Return what both solvers are told: silence, one thread, an absolute gap and a time limit."""
    return {
        "msg": False,
        "gapRel": 0.0,
        "gapAbs": max(gap, TOLERANCE),
        "timeLimit": seconds,
        "threads": 1,
    }


def _highs(program: Program, gap: float, seconds: float) -> Result:
    import highspy
    import pulp

    model, picks = _modelled(program)
    options = _options(gap, seconds)
    solver = pulp.HiGHS(**options, random_seed=0, mip_feasibility_tolerance=1e-9)
    # Does the work of `model.solve(solver)`, plus setting a start, which PuLP 3 does not offer.
    solver.createAndConfigureSolver(model)
    solver.buildSolverModel(model)
    highs = model.solverModel
    start = highspy.HighsSolution()
    start.col_value = [float(v.varValue or 0) for v in model.variables()]
    highs.setSolution(start)
    solver.callSolver(model)
    status, info = highs.getModelStatus(), highs.getInfo()
    infeasible = status == highspy.HighsModelStatus.kInfeasible
    if infeasible or info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Result(picked=None, bound=-np.inf, finished=infeasible)
    solver.findSolutionValues(model)
    done = status == highspy.HighsModelStatus.kOptimal
    return Result(picked=_picked(picks), bound=float(info.mip_dual_bound), finished=done)


def _cbc(program: Program, gap: float, seconds: float) -> Result:
    import pulp

    model, picks = _modelled(program)
    with warnings.catch_warnings():
        # PuLP 3.3 announces that its bundled CBC will move to a package of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        own = ["randomSeed 1", "integerTolerance 1e-9", "increment 1e-7"]
        solver = pulp.PULP_CBC_CMD(**_options(gap, seconds), warmStart=True, options=own)
        if not solver.available():
            raise BitknapError("cbc: PuLP finds no CBC; pip install pulp[cbc], or use HiGHS")
        model.solve(solver)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        proven = model.sol_status == pulp.LpSolutionInfeasible
        return Result(picked=None, bound=-np.inf, finished=proven)
    picked = _picked(picks)
    done = model.sol_status == pulp.LpSolutionOptimal
    # PuLP does not pass on CBC's bound, so a bound is known only if CBC finished.
    bound = float(program.cost[picked].sum()) - max(gap, TOLERANCE) if done else -np.inf
    return Result(picked=picked, bound=bound, finished=done)


def _picked(picks: list[Any]) -> Any:
    """Return which options were picked; solvers return 0.9999999 for 1."""
    return np.array([(pick.varValue or 0) > 0.5 for pick in picks])


_RUNNERS: dict[str, Runner] = {"highs": _highs, "cbc": _cbc}
