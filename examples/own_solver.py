"""Write your own solver: choose a format for every unit under a budget.

Run it with `python examples/own_solver.py`. It needs no model and no torch.

A solver has a name and `answer(problem)`. The problem is plain arrays: what each format costs each
row, and what it weighs. The guide is the docstring of `bitknap.allocation.solvers.solver`.
"""

import numpy as np

import bitknap
from bitknap.allocation import Answer, Status


class StepDown:
    """Start with the cheapest format of every row, and give up bits until the budget holds.

    Each step takes the row that loses least for each byte that it saves. That is a heuristic: its
    plans are within the limits, and need not be the best.
    """

    name = "step-down"

    def answer(self, problem: bitknap.Problem) -> Answer:
        """Return a choice for every row, or none if the lightest plan is too heavy."""
        # R rows, F formats. A forbidden format costs infinity, so it is never the cheapest.
        cost = problem.cost  # float64 [R, F]
        weight = problem.weights[0]  # float64 [R, F]; the first limit is the budget in bytes
        each = np.arange(len(cost))
        choice = cost.argmin(axis=1)
        while weight[each, choice].sum() > problem.bounds[0]:
            saved = weight[each, choice][:, None] - weight
            lost = cost - cost[each, choice][:, None]
            # What a step loses for each byte that it saves; infinite where it saves nothing.
            price = np.where(saved > 0, lost / np.maximum(saved, 1e-9), np.inf)
            row, format = np.unravel_index(price.argmin(), price.shape)
            if not np.isfinite(price[row, format]):
                return Answer(choice=None, bound=-np.inf, status=Status.FEASIBLE)
            choice[row] = format
        # No plan costs less than the cheapest format of every row.
        bound = float(cost.min(axis=1).sum())
        return Answer(choice=choice, bound=bound, status=Status.FEASIBLE)


def main() -> tuple[bitknap.Solution, bitknap.Solution]:
    """Solve one problem with the solver above and with the exact one."""
    # 200 units and 4 formats: costs fall with the bytes, in steps of each unit's own.
    generator = np.random.default_rng(0)
    cost = np.sort(generator.lognormal(size=(200, 4)), axis=1)[:, ::-1]
    nbytes = np.cumsum(generator.integers(100, 300, size=(200, 4)), axis=1)
    table = bitknap.CostTable.from_arrays(cost, nbytes)

    problem = bitknap.Problem(table, bitknap.Budget.bytes(80_000))
    # `solve` checks the answer: the limits, the cost and the bound.
    ours = bitknap.solve(problem, StepDown())
    best = bitknap.solve(problem, bitknap.Knapsack())
    print(f"{ours.solver}: cost {ours.cost:.3f}")
    print(f"{best.solver}: cost {best.cost:.3f}, gap {best.gap:.1e}")
    return ours, best


if __name__ == "__main__":
    main()
