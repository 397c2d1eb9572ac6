"""MxMoE's product of loss and time, exact without a commercial solver; equal layer budgets.

The logarithm of the product is concave and rises with both, so over all plans the product is least
at a corner of the lower left hull of (loss, time). Minimising weighted sums yields those corners,
and each weighted sum is a knapsack.

Source: MxMoE, arXiv 2505.05799, eq. 7 as an account of the paper numbers it, and its code. The
losses that it adds up are measured in `bitknap.estimators.published.mxmoe`, which needs torch; this
file does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Bools, Floats, Ints, Longs
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import Units
from bitknap.allocation.published.one_limit import bounded
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.solver import Solver
from bitknap.errors import InfeasibleError, InputError

# Relative gain that may be only rounding in the knapsack.
_NOISE = 1e-11

_Line = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MxMoe:
    """Minimise loss^exponent * time^(1 - exponent) under the limits.

    The time of each choice is a limit of the problem, usually one without a bound:
    `Limit("time", seconds, inf)`. To reproduce the paper, tie the table with
    `profile("gate_eq_up")` and wrap the solver in `PerLayer`; alone it works on the whole model.
    The authors give the logarithms to a commercial solver; here the corners of the hull are
    enumerated (Aneja and Nair, 1979) and segments that cannot hold the least product are skipped,
    so the answer is exact whenever `Knapsack` proves its own answers. The bound is on the loss
    alone: its gap is the price of the time, and of equal budgets for layers.

    Attributes:
        exponent: r in the paper; 1 minimises the loss alone and 0 the time alone. The paper takes
            0.75 where activations are quantized too, and 1 for weights only.
        time: name of the limit that holds the time; not needed at 1.

    Source: MxMoE, arXiv 2505.05799, objective L^r * T^(1-r) of eq. 7.
    """

    exponent: float = 0.75
    time: str = "time"

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise InputError(f"exponent: {self.exponent} is outside 0 to 1")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "mxmoe"

    def answer(self, problem: Problem) -> Answer:
        """Return the plan with the least product, and a bound on the loss.

        Raises:
            InputError: no limit holds the time, or a time is negative.
        """
        if self.exponent == 1:
            return Knapsack().answer(problem)
        search = _Search(problem=problem, times=self._times(problem), exponent=self.exponent)
        fastest = search.point(0, 1)
        if isinstance(fastest, Answer):
            return fastest
        if self.exponent == 0:
            return bounded(problem, fastest.choice)
        best = search.point(1, 0)
        if isinstance(best, Answer):
            return best
        choice = search.least(best, fastest)
        return Answer(choice=choice, bound=best.line[2], status=Status.FEASIBLE)

    def _times(self, problem: Problem) -> Floats:
        names = [limit.name for limit in problem.limits]
        if self.time not in names:
            raise InputError(
                f"mxmoe: no limit {self.time!r} in the problem; "
                f'add Limit("{self.time}", weight, inf) with the time of each choice'
            )
        times: Floats = problem.weights[names.index(self.time)]
        if (times < 0).any():
            raise InputError(f"mxmoe: a time is {times.min():.6g}; it must be at least 0")
        return times


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Point:
    """A plan, and a line that bounds all plans: a * loss + b * time >= c."""

    choice: Longs | Ints
    loss: float
    time: float
    line: _Line


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """The search over the corners of one problem."""

    problem: Problem
    times: Floats
    exponent: float

    def point(self, loss: float, time: float) -> _Point | Answer:
        """Return the plan with the least weighted sum, or the answer that there is none."""
        cost = self.problem.cost
        finite = np.isfinite(cost)
        priced = np.where(finite, loss * np.where(finite, cost, 0) + time * self.times, np.inf)
        answer = Knapsack().answer(_recosted(self.problem, priced))
        if answer.choice is None:
            return answer
        rows = np.arange(len(cost))
        return _Point(
            choice=answer.choice,
            loss=float(cost[rows, answer.choice].sum()),
            time=float(self.times[rows, answer.choice].sum()),
            line=(loss, time, answer.bound),
        )

    def value(self, loss: float, time: float) -> float:
        """Return the logarithm of the product."""
        return self.exponent * _log(loss) + (1 - self.exponent) * _log(time)

    def least(self, cheapest: _Point, fastest: _Point) -> Longs | Ints:
        """Return the choice with the least product over all corners between two points."""
        best = min((cheapest, fastest), key=lambda point: self.value(point.loss, point.time))
        segments = [(cheapest, fastest)]
        while segments:
            left, right = segments.pop()
            width, height = right.loss - left.loss, left.time - right.time
            if width <= 0 or height <= 0:
                continue
            if self.value(*_corner(left, right)) >= self.value(best.loss, best.time):
                continue
            corner = self.point(1 / width, 1 / height)
            if isinstance(corner, Answer):
                continue
            if self.value(corner.loss, corner.time) < self.value(best.loss, best.time):
                best = corner
            here = left.loss / width + left.time / height
            if corner.loss / width + corner.time / height < here * (1 - _NOISE):
                segments += [(left, corner), (corner, right)]
        return best.choice


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _corner(left: _Point, right: _Point) -> tuple[float, float]:
    """Return lower bounds on loss and time between two points: where their lines meet."""
    (a, b, c), (d, e, f) = left.line, right.line
    determinant = a * e - b * d
    loss, time = left.loss, right.time
    if determinant > 1e-9 * (abs(a * e) + abs(b * d)):
        # Lines from loose bounds may meet outside the box of the two points, which is also a bound.
        loss = max(loss, (c * e - f * b) / determinant)
        time = max(time, (a * f - d * c) / determinant)
    return loss, time


def _recosted(problem: Problem, cost: Floats) -> Problem:
    """Return a problem with the same rows and other costs."""
    table = CostTable.from_arrays(cost, np.ones(cost.shape, dtype=np.int64))
    limits = [
        Limit(limit.name, weight, bound)
        for limit, weight, bound in zip(
            problem.limits, problem.weights, problem.bounds.tolist(), strict=True
        )
        if math.isfinite(bound)
    ]
    return Problem(table, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayer:
    """Give every layer its share of each limit and solve it alone.

    MxMoE, MC-MoE and Chowdhury et al. do this: the same average bits in every layer, with no bits
    moved between layers. A layer's share is its share of the weights (of the units, without
    shapes). The bound is for the whole model, so that the gap shows the price of equal budgets.

    Attributes:
        solver: the solver for each layer.
    """

    solver: Solver

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return f"{self.solver.name} per layer"

    def answer(self, problem: Problem) -> Answer:
        """Return the combined choices of all layers, and a bound on all plans.

        Raises:
            InputError: a tie joins layers, or a limit is negative.
            InfeasibleError: a layer has no plan within its share.
        """
        layers = problem.table.units.layer
        first = np.unique(problem.row_of, return_index=True)[1]
        if (layers != layers[first][problem.row_of]).any():
            raise InputError(f"{self.name}: a tie joins units of different layers; untie them")
        if (problem.bounds < 0).any():
            raise InputError(
                f"{self.name}: a negative limit cannot be shared among layers; drop it"
            )
        choice = np.zeros(len(layers), dtype=np.int32)
        for layer in np.unique(layers).tolist():
            here = layers == layer
            part = _part(problem, here)
            answer = self.solver.answer(part)
            if answer.choice is None:
                raise InfeasibleError(
                    f"{self.name}: layer {layer} has no plan within its share of the limits; "
                    "raise them or solve all layers together"
                )
            choice[here] = part.expand(answer.choice)
        return bounded(problem, choice[first])


def _part(problem: Problem, here: Bools) -> Problem:
    """Return the problem of some units, with their share of each limit."""
    table = problem.table
    units = Units.from_arrays(
        {name: column[here] for name, column in table.units.to_arrays().items()},
        table.units.projections,
    )
    sizes = table.units.numel if table.units.has_shapes else np.ones(len(here), dtype=np.int64)
    # Every array of a table has one entry per unit.
    columns: dict[str, Any] = {item.name: getattr(table, item.name) for item in fields(table)}
    columns = {name: x[here] for name, x in columns.items() if isinstance(x, np.ndarray)}
    part = replace(table, units=units, **columns)
    limits = [
        Limit(
            limit.name,
            np.broadcast_to(limit.weight, table.cost.shape)[here],
            # Multiplied first, so that whole-number shares are exact.
            limit.bound * int(sizes[here].sum()) / int(sizes.sum()),
            unit=limit.unit,
        )
        for limit in problem.limits
    ]
    return Problem(part, limits)
