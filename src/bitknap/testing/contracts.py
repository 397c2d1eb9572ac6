"""Contracts of plug-ins, as test classes to subclass; pytest runs their `test_` methods.

Nothing here needs pytest itself. `bitknap.testing` offers the contracts to users.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation import Budget, CostTable, Limit, Problem, Solution, Solver, solve


class SolverContract:
    """The contract of solvers; subclass it in a test file and set `solver`.

        class TestMine(SolverContract):
            solver = Mine()

    Attributes:
        solver: the solver, or a method that returns one.
        exact: whether plans must be as good as the best one found by trying all plans; otherwise
            only within the gap that the solver claims.
        several_limits: whether the solver takes more than one limit.
        instances: number of random problems for each test.
    """

    solver: Any
    exact: bool = True
    several_limits: bool = True
    instances: int = 10

    def _solver(self) -> Solver:
        solver: Solver = self.solver if hasattr(self.solver, "answer") else self.solver()
        return solver

    def _solve(self, problem: Problem) -> Solution:

        # Checks the limits, the forbidden formats, the cost, and that the bound is not above it.
        return solve(problem, self._solver())

    def _problems(self) -> Iterator[Problem]:
        for seed in range(self.instances):
            yield small_problem(seed)
            if self.several_limits:
                yield small_problem(seed, limits=2)

    def test_it_has_a_name(self) -> None:
        """Messages and plans name the solver."""
        name = self._solver().name
        assert isinstance(name, str) and name, f"name is {name!r}, expected a text"

    def test_plans_agree_with_trying_them_all(self) -> None:
        """Plans keep the limits; no bound is above the best cost, and no cost below it."""
        for problem in self._problems():
            best = least_cost(problem)
            solution = self._solve(problem)
            noise = 1e-9 * max(1.0, abs(best))
            assert solution.bound <= best + noise, (
                f"bound {solution.bound} is above the best, {best}"
            )
            assert solution.cost >= best - noise, f"cost {solution.cost} is below the best, {best}"
            if self.exact:
                assert solution.cost <= best + noise, f"cost {solution.cost}, the best is {best}"
                assert solution.gap <= 1e-9, f"gap {solution.gap}, expected a proof"

    def test_the_same_problem_has_the_same_answer(self) -> None:
        """Nothing depends on clocks, addresses or global random states."""
        for problem in self._problems():
            first, second = self._solve(problem), self._solve(problem)
            assert first.choice.tolist() == second.choice.tolist(), "two runs, two plans"
            assert first.bound == second.bound, "two runs, two bounds"

    def test_tied_units_share_a_format(self) -> None:
        """Ties reach solvers as summed rows."""
        for seed in range(self.instances):
            plain = small_problem(seed)
            labels = np.arange(len(plain.table.units)) // 2
            problem = replaced(plain, plain.table.tie(labels))
            choice = self._solve(problem).choice
            assert (choice[::2][: len(choice) // 2] == choice[1::2]).all(), "a tie was broken"

    def test_forbidden_formats_are_not_chosen(self) -> None:
        """Pins reach solvers as infinite costs."""
        for seed in range(self.instances):
            plain = small_problem(seed)
            problem = replaced(plain, plain.table.pin("expert=0", format="option-0"))
            assert self._solve(problem).choice[0] == 0, "a pinned unit took another format"

    def test_the_only_plan_within_the_limit_is_found(self) -> None:
        """The limit allows only the lightest option of every unit."""
        for seed in range(self.instances):
            problem = limited(small_problem(seed), 0.0)
            solution = self._solve(problem)
            assert solution.plan.total_bytes == problem.bounds[0], "the lightest plan was missed"

    def test_without_a_limit_every_unit_takes_its_cheapest_format(self) -> None:
        """An infinite bound is no limit."""
        for seed in range(self.instances):
            problem = limited(small_problem(seed), np.inf)
            best = float(problem.cost.min(axis=1).sum())
            solution = self._solve(problem)
            assert solution.bound <= best + 1e-9 * max(1.0, abs(best)), "bound above the best plan"
            if self.exact:
                assert abs(solution.cost - best) <= 1e-9 * max(1.0, abs(best)), "not the cheapest"

    def test_a_problem_without_plans_has_no_plan(self) -> None:
        """The answer is infeasible or no plan, never a plan that breaks a limit."""
        for seed in range(self.instances):
            problem = limited(small_problem(seed), -0.1)
            answer = self._solver().answer(problem)
            assert answer.choice is None, "a plan for a problem that has none"

    def test_clashing_limits_have_no_plan(self) -> None:
        """Each limit can be met alone, but not both together."""
        if not self.several_limits:
            return
        weight = np.tile([0.0, 1.0, 2.0], (4, 1))
        table = CostTable.from_arrays(np.tile([2.0, 1.0, 0.0], (4, 1)), np.tile([1, 2, 3], (4, 1)))
        limits = [Limit("light", weight, 3.0), Limit("heavy", -weight, -4.0)]
        answer = self._solver().answer(Problem(table, limits))
        assert answer.choice is None, "a plan for a problem that has none"

    def test_the_order_of_units_does_not_matter(self) -> None:
        """A permuted problem has a plan of the same cost, or at least within the bounds."""
        for seed in range(self.instances):
            problem = small_problem(seed)
            order = np.random.default_rng(seed).permutation(len(problem.table.units))
            first, second = self._solve(problem), self._solve(permuted(problem, order))
            noise = 1e-9 * max(1.0, abs(first.cost))
            assert first.bound <= second.cost + noise, "a bound above another order's plan"
            assert second.bound <= first.cost + noise, "a bound above another order's plan"
            if self.exact:
                assert abs(first.cost - second.cost) <= noise, "another order, another cost"


def small_problem(seed: int, *, limits: int = 1, units: int = 5, formats: int = 4) -> Problem:
    """Return a random feasible problem that is small enough to try all plans.

    Costs are not convex, some formats are dominated, some forbidden; the first limit is on bytes.
    """
    generator = np.random.default_rng(seed)
    nbytes = np.cumsum(generator.integers(1, 20, (units, formats)), axis=1)
    cost = np.sort(generator.integers(0, 10**6, (units, formats)) / 1e6, axis=1)[:, ::-1].copy()
    cost[0, ::2], cost[-1, -1] = cost[0, ::2] + 0.3, np.inf
    table = CostTable.from_arrays(cost, nbytes)
    low, high = nbytes.min(axis=1).sum(), nbytes.max(axis=1).sum()
    bounds: list[Limit | Budget] = [
        Budget.bytes(int(low + generator.uniform(0.2, 0.8) * (high - low)))
    ]
    for number in range(1, limits):
        weight = generator.integers(0, 10, (units, formats)).astype(float)
        # The plan with the fewest bytes meets this limit, so the problem is feasible.
        bounds.append(Limit(f"limit {number}", weight, float(weight[:, 0].sum())))
    return Problem(table, bounds)


def least_cost(problem: Problem) -> float:
    """Return the least cost of plans within the limits, by trying all; inf if there are none."""
    count, width = problem.cost.shape
    plans = np.indices((width,) * count).reshape(count, -1)
    rows = np.arange(count)[:, None]
    used = problem.weights[:, rows, plans]
    # Integer weights are exact; others may exceed the limit by rounding errors.
    fits = used.sum(axis=1) <= (problem.bounds[:, None] + 1e-12 * np.abs(used).sum(axis=1))
    costs = problem.cost[rows, plans].sum(axis=0)
    return float(np.where(fits.all(axis=0), costs, np.inf).min())


def replaced(problem: Problem, table: CostTable) -> Problem:
    """Return the problem with another table, under a limit that its lightest plan can meet."""
    first = problem.limits[0]
    bound = max(first.bound, spanned(Problem(table, first))[0])
    return Problem(table, Limit(first.name, first.weight, bound, unit=first.unit))


def limited(problem: Problem, share: float) -> Problem:
    """Return the problem with its first limit at a share of the way from lightest to heaviest."""
    first, (low, high) = problem.limits[0], spanned(problem)
    bound = np.inf if np.isinf(share) else float(np.floor(low + share * (high - low)))
    return Problem(problem.table, Limit(first.name, first.weight, bound, unit=first.unit))


def spanned(problem: Problem) -> tuple[float, float]:
    """Return the weight of the lightest and of the heaviest plan under the first limit."""
    allowed, weight = np.isfinite(problem.cost), problem.weights[0]
    low = np.where(allowed, weight, np.inf).min(axis=1).sum()
    return float(low), float(np.where(allowed, weight, -np.inf).max(axis=1).sum())


def permuted(problem: Problem, order: npt.NDArray[np.intp]) -> Problem:
    """Return a problem of random units with its units in another order."""
    table, shape = problem.table, problem.table.cost.shape
    limits = [
        Limit(item.name, np.broadcast_to(item.weight, shape)[order], item.bound)
        for item in problem.limits
    ]
    return Problem(CostTable.from_arrays(table.cost[order], table.nbytes[order]), limits)
