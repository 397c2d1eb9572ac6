"""The protocol `Solver`, and how to write your own.

A solver gets a `Problem` and returns an `Answer`. The problem is plain arrays, with ties and pins
already in them: `problem.cost` is float64 [R, F] for R rows (units that must share a format are
one row) and F formats, and infinite where a format is forbidden; `problem.weights` is float64
[L, R, F] for L limits, of which the first is usually the budget in bytes; `problem.bounds` is
float64 [L].

    class Cheapest:
        name = "cheapest"

        def answer(self, problem):
            choice = problem.cost.argmin(axis=1)
            bound = float(problem.cost.min(axis=1).sum())
            return Answer(choice=choice, bound=bound, status=Status.OPTIMAL)

* `Answer.choice` is a format for each row, int [R], or None if the solver has no plan.
* `Answer.bound` is a lower bound on the cost of every plan; `-inf` claims nothing.
* `Answer.status` is `OPTIMAL`, `FEASIBLE` or `INFEASIBLE`.

`solve(problem, Cheapest())` recomputes the cost, the use of each limit and the bound, and raises
an error if the answer is wrong: a bug in a solver cannot produce a wrong plan.

Test it by subclassing `bitknap.testing.SolverContract`. Offer it to the command line, where it
becomes `--solver cheapest`, with an entry point in your package's `pyproject.toml`:

    [project.entry-points."bitknap.solvers"]
    cheapest = "your_package:Cheapest"

The class is called with those of the arguments `seed`, `gap` and `time_limit` that it takes by
name. `examples/own_solver.py` is a whole solver that runs.
"""

from __future__ import annotations

from typing import Protocol

from bitknap.allocation.plans.solution import Answer
from bitknap.allocation.problem.problem import Problem


class Solver(Protocol):
    """Any object with a name that answers problems."""

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        ...

    def answer(self, problem: Problem) -> Answer:
        """Return a choice and a bound on the cost of all choices.

        Args:
            problem: costs, limits and bounds as arrays.
        """
        ...
