"""Does a table order plans as the model does? Makes plans of equal bytes and checks their KL.

An estimator may rank units well and still mislead a solver, which picks what is underestimated.
So the check uses whole plans: some near the solver's choice, and random ones
(methods.md#checking). Measure them on text that was not used for calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Floats, frozen
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.solving import solve
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.group_kl.regression import rank_correlation

# Standard deviation of log costs: for plans near the best one, and for random plans.
_NEAR, _FAR = 0.5, 2.0
# Draws per wanted plan before fewer distinct plans are accepted.
_DRAWS = 10
# These plans need not be the optimum of their made-up costs.
_SOLVER = Knapsack(gap=1e-3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanCheck:
    """How well a table predicts the KL of whole plans.

    Attributes:
        predicted: cost of each plan by the table, float64[P].
        measured: its KL, nats a token, float64[P].
        spearman: rank correlation of the two; NaN when either is constant.
        slope: least-squares slope of log measured on log predicted; 1 if ratios are predicted
            correctly; NaN if all predictions are equal.
        scale: sum of measured over sum of predicted; 1 if KL is additive and the costs are right.
        regret: measured KL of the plan with the lowest predicted cost over the lowest measured KL;
            1 is best. Meaningful only among plans of equal bytes.
        byte_spread: bytes of the largest plan over those of the smallest, minus 1.
    """

    predicted: Floats
    measured: Floats
    spearman: float
    slope: float
    scale: float
    regret: float
    byte_spread: float


def check_plans(
    table: CostTable, plans: Sequence[BitPlan], measured_kl: npt.ArrayLike
) -> PlanCheck:
    """Compare a table's costs of plans with their measured KL.

    Args:
        table: the costs.
        plans: at least 3, not used to fit the table; of equal bytes if the regret is to be used.
        measured_kl: measured KL of each plan, nats per token, above 0, float64[P].

    Raises:
        InputError: fewer than 3 plans, or a KL that is not above 0.
        MismatchError: a plan has other units, or uses a format that the table does not have.
    """
    kl = frozen("measured_kl", measured_kl, np.float64, (len(plans),))
    if len(plans) < 3:
        raise InputError(
            f"plans: {len(plans)} is below 3, the fewest that can be ranked; give more"
        )
    if not (np.isfinite(kl) & (kl > 0)).all():
        index = int((~(np.isfinite(kl) & (kl > 0))).argmax())
        raise InputError(f"measured_kl[{index}]: {kl[index]} is not a finite number above 0")
    predicted = np.array([_cost(table, index, plan) for index, plan in enumerate(plans)])
    if not (np.isfinite(predicted) & (predicted > 0)).all():
        index = int((~(np.isfinite(predicted) & (predicted > 0))).argmax())
        raise InputError(
            f"plans[{index}]: the table predicts {predicted[index]} for it; check plans that the "
            "table allows and that round something"
        )
    x, y = np.log(predicted), np.log(kl)
    x, y = x - x.mean(), y - y.mean()
    varies = np.ptp(x) > 1e-12
    sizes = [plan.total_bytes for plan in plans]
    return PlanCheck(
        predicted=predicted,
        measured=kl,
        spearman=rank_correlation(predicted, kl),
        slope=float(x @ y / (x @ x)) if varies else float("nan"),
        scale=float(kl.sum() / predicted.sum()),
        regret=float(kl[predicted.argmin()] / kl.min()),
        byte_spread=max(sizes) / max(1, min(sizes)) - 1,
    )


def plans_for_check(problem: Problem, count: int = 12, seed: int = 0) -> tuple[BitPlan, ...]:
    """Return the solver's plan, plans near it, and random ones, all filling the same limits.

    The first plan is the problem's solution. Every second of the others solves it with
    each row's costs multiplied by a lognormal number (deviation 0.5 of the log), so it is near the
    frontier; the rest solve made-up costs that use only the table's mean over units, multiplied
    likewise (deviation 2). Bytes differ only by what no further step can use. All plans are
    distinct; fewer are returned only if the limits allow no more.

    Args:
        problem: a table and limits; the budget must bind, or every plan is the widest.
        count: number of plans, at least 3.
        seed: random seed of the draws.

    Raises:
        InputError: `count` is below 3.
        InfeasibleError: no plan is within the limits.
    """
    if count < 3:
        raise InputError(
            f"count: {count} is below 3, the fewest plans that can be ranked; ask for more"
        )
    generator = np.random.default_rng(seed)
    plans = [solve(problem, _SOLVER).plan]
    seen = {plans[0].choice.tobytes()}
    blank = _blank(problem.table)
    for _ in range(_DRAWS * count):
        if len(plans) == count:
            break
        near = len(plans) % 2 == 1
        noise = generator.standard_normal(len(problem.cost))[problem.row_of]
        factor = np.exp((_NEAR if near else _FAR) * noise)[:, None]
        cost = (problem.table.cost if near else blank) * factor
        plan = solve(Problem(replace(problem.table, cost=cost), problem.limits), _SOLVER).plan
        if plan.choice.tobytes() not in seen:
            seen.add(plan.choice.tobytes())
            origin = {"solver": "near the frontier" if near else "random", "seed": seed}
            plans.append(replace(plan, header={**origin, "limits": plan.header["limits"]}))
    return tuple(plans)


def _blank(table: CostTable) -> Floats:
    """Return costs that depend only on a unit's size; forbidden formats stay forbidden."""
    size = table.units.numel if table.units.has_shapes else np.ones(len(table.units))
    allowed = np.isfinite(table.cost)
    total = np.where(allowed, table.cost, 0.0).sum(axis=0)
    mean = total / np.maximum((allowed * size[:, None]).sum(axis=0), 1)
    return np.where(allowed, size[:, None] * mean, np.inf)


def _cost(table: CostTable, index: int, plan: BitPlan) -> float:
    if not table.units.same_as(plan.units):
        raise MismatchError(
            f"plans[{index}]: its {len(plan.units)} units differ from the {len(table.units)} of "
            "the table; check plans of the same model, in the table's order"
        )
    column = {item: number for number, item in enumerate(table.formats)}
    used = np.unique(plan.choice)
    for choice in used.tolist():
        if plan.formats[choice] not in column:
            raise MismatchError(
                f"plans[{index}]: the table has no {plan.formats[choice]}; estimate it with the "
                "plan's formats"
            )
    place = np.array([column.get(item, -1) for item in plan.formats])
    return float(table.cost[np.arange(len(plan.choice)), place[plan.choice]].sum())
