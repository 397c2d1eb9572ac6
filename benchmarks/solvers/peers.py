"""Baseline solvers: the same problem, formulated as users of other tools would.

Each has `build`, which makes the tool's model from the arrays, and `run`, which solves it. Costs
and weights are scaled so that the tools' absolute tolerances hardly matter; all use a relative gap
of 1e-9 and one thread.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Ints, Longs
from bitknap.allocation.problem.problem import Problem
from bitknap.errors import InputError

GAP = 1e-9
# Largest coefficients after scaling, as far as whole numbers allow.
_COST, _WEIGHT = 1e6, 1e5
# Maximum cells in the dynamic program's table of choices, one byte each.
_CELLS = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One way to solve the problem with another tool.

    Attributes:
        about: description for the report.
        build: makes the tool's model.
        run: solves it within a number of seconds.
        needs: module without which it is skipped.
        options: largest table it is run on, units x formats.
        limits: maximum number of limits it supports.
        exact: whether it claims optimal plans.
    """

    about: str
    build: Callable[[Problem], Any]
    run: Callable[[Any, float], Answer]
    needs: str = "numpy"
    options: int = 600_000
    limits: int = 1000
    exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaled:
    """The allowed options, flat, with costs and weights that suit the tools.

    Attributes:
        row: int[N], increasing.
        option: column of each option, int[N].
        cost: float64[N], the largest 1e6.
        weights: float64[M,N]; whole numbers where the problem's are, without common divisor.
        bounds: float64[M], in the same units.
        rows: number of rows of the problem.
        unit: cost in the problem of one unit of scaled cost.
    """

    row: Longs
    option: Longs
    cost: Floats
    weights: Floats
    bounds: Floats
    rows: int
    unit: float

    def answer(self, picked: Any, bound: float, *, done: bool) -> Answer:
        """Return the answer for picked options, bool[N]; `bound` is in scaled cost."""
        choice = np.zeros(self.rows, dtype=np.int64)
        choice[self.row[picked]] = self.option[picked]
        status = Status.OPTIMAL if done else Status.FEASIBLE
        return Answer(choice=choice, bound=bound * self.unit, status=status)

    def nothing(self, bound: float = -np.inf) -> Answer:
        """Return the answer of a tool that found no plan in time."""
        return Answer(choice=None, bound=bound * self.unit, status=Status.FEASIBLE)

    def groups(self) -> Iterator[slice]:
        """Yield the slice of each row in the flat arrays."""
        ends = np.cumsum(np.bincount(self.row, minlength=self.rows)).tolist()
        return (slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True))


def scaled(problem: Problem) -> Scaled:
    """Flatten and scale a problem; infinite limits are dropped."""
    row, option = np.nonzero(np.isfinite(problem.cost))
    cost = problem.cost[row, option]
    unit = float(np.abs(cost).max()) / _COST or 1.0
    finite = np.isfinite(problem.bounds)
    weights, bounds = problem.weights[finite][:, row, option], problem.bounds[finite].copy()
    for weight, index in zip(weights, range(len(bounds)), strict=True):
        whole = (weight == np.floor(weight)).all() and np.abs(weight).max() < 2**53
        divisor = float(np.gcd.reduce(weight.astype(np.int64))) if whole else 0.0
        divisor = divisor or float(np.abs(weight).max()) / _WEIGHT or 1.0
        weight /= divisor
        bounds[index] = np.floor(bounds[index] / divisor) if whole else bounds[index] / divisor
    return Scaled(
        row=row,
        option=option,
        cost=cost / unit,
        weights=weights,
        bounds=bounds,
        rows=len(problem.cost),
        unit=unit,
    )


def _pulp_model(problem: Problem) -> tuple[Scaled, Any, list[Any]]:
    import pulp

    flat = scaled(problem)
    model = pulp.LpProblem("bits", pulp.LpMinimize)
    # PuLP 3.3 warns about every variable made without its model.
    create = getattr(model, "add_variable", pulp.LpVariable)
    picks = [create(f"x{i}", cat=pulp.LpBinary) for i in range(len(flat.row))]
    model += pulp.LpAffineExpression(zip(picks, flat.cost.tolist(), strict=True))
    for group in flat.groups():
        model += pulp.lpSum(picks[group]) == 1
    for weight, bound in zip(flat.weights, flat.bounds.tolist(), strict=True):
        model += pulp.LpAffineExpression(zip(picks, weight.tolist(), strict=True)) <= bound
    return flat, model, picks


def _pulp_answer(flat: Scaled, model: Any, picks: list[Any], bound: float) -> Answer:
    values = np.array([pick.varValue or 0.0 for pick in picks])
    if (np.bincount(flat.row[values > 0.5], minlength=flat.rows) != 1).any():
        return flat.nothing(bound)
    # PuLP reports "optimal" also for the best plan at the time limit; sol_status does not.
    return flat.answer(values > 0.5, bound, done=model.sol_status == 1)


def _run_pulp_cbc(built: tuple[Scaled, Any, list[Any]], seconds: float) -> Answer:
    import pulp

    flat, model, picks = built
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # PuLP 3.3 warns that its bundled CBC will move to a separate package.
        warnings.simplefilter("ignore", DeprecationWarning)
        log = Path(folder) / "log"
        solver = pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, timeLimit=seconds, logPath=str(log))
        model.solve(solver)
        text = log.read_text() if log.exists() else ""
    if model.sol_status == 1:
        value = float(pulp.value(model.objective))
        return _pulp_answer(flat, model, picks, value - GAP * abs(value))
    # If stopped early, CBC gives its bound only in the log: from the search, else the relaxation.
    said = re.findall(r"(?:Lower bound:|Continuous objective value is)\s+(\S+)", text)
    return _pulp_answer(flat, model, picks, max(map(float, said), default=-np.inf))


def _run_pulp_highs(built: tuple[Scaled, Any, list[Any]], seconds: float) -> Answer:
    import pulp

    flat, model, picks = built
    model.solve(pulp.HiGHS(msg=False, gapRel=GAP, gapAbs=0.0, threads=1, timeLimit=seconds))
    return _pulp_answer(flat, model, picks, float(model.solverModel.getInfo().mip_dual_bound))


def _build_scipy(problem: Problem) -> tuple[Scaled, Any]:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    flat = scaled(problem)
    count = len(flat.row)
    one = csr_array((np.ones(count), (flat.row, np.arange(count))), shape=(flat.rows, count))
    return flat, [
        LinearConstraint(one, 1, 1),
        LinearConstraint(csr_array(flat.weights), -np.inf, flat.bounds),
    ]


def _run_scipy(built: tuple[Scaled, Any], seconds: float) -> Answer:
    from scipy.optimize import Bounds, milp

    flat, constraints = built
    result = milp(
        flat.cost,
        integrality=np.ones(len(flat.cost)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": seconds},
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    if result.x is None:
        return flat.nothing(bound)
    return flat.answer(result.x > 0.5, bound, done=result.status == 0)


def _build_cp_sat(problem: Problem) -> tuple[Scaled, Any, list[Any], float]:
    cp_model = import_module("ortools.sat.python.cp_model")
    flat = scaled(problem)
    # Integers only: the sum of the most expensive options becomes 2**50, weights are rounded up.
    largest = np.zeros(flat.rows)
    np.maximum.at(largest, flat.row, np.abs(flat.cost))
    scale = 2.0**50 / largest.sum()
    model = cp_model.CpModel()
    picks = [model.new_bool_var("") for _ in range(len(flat.row))]
    for group in flat.groups():
        model.add_exactly_one(picks[group])
    for weight, bound in zip(flat.weights, flat.bounds.tolist(), strict=True):
        fine = 1.0 if (weight == np.floor(weight)).all() else 1e6
        whole = np.ceil(weight * fine).astype(np.int64)
        expression = cp_model.LinearExpr.weighted_sum(picks, whole)
        model.add(expression <= int(np.floor(bound * fine)))
    cost = np.rint(flat.cost * scale).astype(np.int64)
    model.minimize(cp_model.LinearExpr.weighted_sum(picks, cost))
    return flat, model, picks, scale


def _run_cp_sat(built: tuple[Scaled, Any, list[Any], float], seconds: float) -> Answer:
    cp_model = import_module("ortools.sat.python.cp_model")
    flat, model, picks, scale = built
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.relative_gap_limit = GAP
    solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model)
    bound = (solver.best_objective_bound - 0.5 * flat.rows) / scale
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return flat.nothing(bound)
    picked = np.array([solver.boolean_value(pick) for pick in picks])
    return flat.answer(picked, bound, done=status == cp_model.OPTIMAL)


def _build_math_opt(problem: Problem) -> tuple[Scaled, Any, list[Any]]:
    mathopt = import_module("ortools.math_opt.python.mathopt")
    flat = scaled(problem)
    model = mathopt.Model()
    picks = [model.add_binary_variable() for _ in range(len(flat.row))]

    def total(values: Floats) -> Any:
        return mathopt.LinearSum(a * x for a, x in zip(values.tolist(), picks, strict=True))

    for group in flat.groups():
        model.add_linear_constraint(mathopt.LinearSum(picks[group]) == 1)
    for weight, bound in zip(flat.weights, flat.bounds.tolist(), strict=True):
        model.add_linear_constraint(total(weight) <= bound)
    model.minimize(total(flat.cost))
    return flat, model, picks


def _run_math_opt(built: tuple[Scaled, Any, list[Any]], seconds: float) -> Answer:
    mathopt = import_module("ortools.math_opt.python.mathopt")
    flat, model, picks = built
    settings = mathopt.SolveParameters(
        time_limit=timedelta(seconds=seconds), relative_gap_tolerance=GAP, threads=1
    )
    result = mathopt.solve(model, mathopt.SolverType.GSCIP, params=settings)
    bound = float(result.termination.objective_bounds.dual_bound)
    if not result.has_primal_feasible_solution():
        return flat.nothing(bound)
    picked = np.array(result.variable_values(picks)) > 0.5
    done = result.termination.reason == mathopt.TerminationReason.OPTIMAL
    return flat.answer(picked, bound, done=done)


def _run_bytes(problem: Problem, seconds: float) -> Answer:
    """Solve by dynamic programming over the used weight, row by row."""
    flat = scaled(problem)
    weight = flat.weights[0]
    if (weight != np.floor(weight)).any() or (weight < 0).any():
        raise InputError("dp: weights must be whole numbers from 0")
    lightest = np.full(flat.rows, np.inf)
    np.minimum.at(lightest, flat.row, weight)
    room = int(min(flat.bounds[0] - lightest.sum(), 2.0**60))
    if room < 0:
        return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
    cells = flat.rows * (room + 1)
    if cells > _CELLS:
        raise InputError(f"dp: {cells:.3g} cells, at most {_CELLS:.3g}; the table is too large")
    best, taken = np.zeros(room + 1), np.zeros((flat.rows, room + 1), dtype=np.uint8)
    extra = (weight - lightest[flat.row]).astype(np.int64)
    for row, group in enumerate(flat.groups()):
        after = np.full(room + 1, np.inf)
        for index in range(group.start, group.stop):
            if extra[index] <= room:
                shifted = best[: room + 1 - extra[index]] + flat.cost[index]
                better = shifted < after[extra[index] :]
                after[extra[index] :][better] = shifted[better]
                taken[row, extra[index] :][better] = index - group.start
        best = after
    picked, left = np.zeros(len(flat.row), dtype=np.bool_), int(best.argmin())
    for row, group in reversed(list(enumerate(flat.groups()))):
        index = group.start + int(taken[row, left])
        picked[index] = True
        left -= int(extra[index])
    value = float(best.min())
    return flat.answer(picked, value - 1e-13 * float(np.abs(flat.cost[picked]).sum()), done=True)


def _run_bisection(problem: Problem, seconds: float) -> Answer:
    """Bisect the price of weight; each row takes its cheapest option. Slack is left unused."""
    weight, bound = problem.weights[0], float(problem.bounds[0])
    rows = np.arange(len(weight))

    def at(price: float) -> tuple[Longs | Ints, float, float]:
        choice = (problem.cost + price * weight).argmin(axis=1)
        used = float(weight[rows, choice].sum())
        return choice, used, float(problem.cost[rows, choice].sum()) + price * (used - bound)

    low, high = 0.0, 1.0
    best = at(high)
    while best[1] > bound and high < 1e300:
        high *= 4
        best = at(high)
    if best[1] > bound:
        return Answer(choice=None, bound=-np.inf, status=Status.FEASIBLE)
    dual = max(best[2], at(low)[2])
    for _ in range(100):
        price = (low + high) / 2
        answer = at(price)
        dual = max(dual, answer[2])
        if answer[1] <= bound:
            high, best = price, answer
        else:
            low = price
    return Answer(choice=best[0], bound=dual, status=Status.FEASIBLE)


def _itself(problem: Problem) -> Problem:
    return problem


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "pulp-cbc": Baseline(
            about="whole model in PuLP, its bundled CBC",
            build=_pulp_model,
            run=_run_pulp_cbc,
            needs="pulp",
        ),
        "pulp-highs": Baseline(
            about="whole model in PuLP, HiGHS", build=_pulp_model, run=_run_pulp_highs, needs="pulp"
        ),
        "scipy-highs": Baseline(
            about="whole model in scipy.optimize.milp, HiGHS",
            build=_build_scipy,
            run=_run_scipy,
            needs="scipy",
            options=2_000_000,
        ),
        "cp-sat": Baseline(
            about="OR-Tools CP-SAT, costs rounded to 2**-50 of their sum",
            build=_build_cp_sat,
            run=_run_cp_sat,
            needs="ortools",
        ),
        "mathopt-scip": Baseline(
            about="OR-Tools MathOpt, SCIP",
            build=_build_math_opt,
            run=_run_math_opt,
            needs="ortools",
        ),
        "dp": Baseline(
            about="dynamic program over bytes / gcd",
            build=_itself,
            run=_run_bytes,
            limits=1,
            options=10_000_000,
        ),
        "bisection": Baseline(
            about="Lagrangian bisection without a fill; not exact",
            build=_itself,
            run=_run_bisection,
            limits=1,
            options=10_000_000,
            exact=False,
        ),
    }
)
