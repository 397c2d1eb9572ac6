"""Does a table order plans as the model does? Plans of equal bytes, and the measured against it.

An estimator may rank units well and still mislead a solver, which picks what is underestimated.
What counts is measured on plans: those the solver would choose, and random ones
(methods.md#checking). Measure them on text that calibrated nothing.
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

# Standard deviation of log costs: what moves a plan a little off the best, and what makes a draw.
_NEAR, _FAR = 0.5, 2.0
# Draws for each plan wanted, before fewer distinct ones are accepted.
_DRAWS = 10
# These plans need not be the optimum of their made-up costs.
_SOLVER = Knapsack(gap=1e-3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanCheck:
    """How well a table predicts the KL of whole plans.

    Attributes:
        predicted: the table's cost of each plan, float64[P].
        measured: its KL, nats a token, float64[P].
        spearman: rank correlation of the two; NaN when either is constant.
        slope: of log measured on log predicted, least squares; 1 when ratios carry over; NaN
            when the predictions are all alike.
        scale: sum of measured over sum of predicted; 1 when KL is additive and costs are true.
        regret: measured KL of the plan that the table likes best over the least measured; 1 is
            best. Means something only among plans of equal bytes.
        byte_spread: largest over smallest plan, less 1.
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
        plans: at least 3, held out from what fitted the table; of equal bytes for the regret.
        measured_kl: measured kl of each plan, nats a token, above 0, float64[P].

    Raises:
        InputError: fewer than 3 plans, or a KL that is not above 0.
        MismatchError: a plan is of other units, or uses a format the table does not have.
    """
    kl = frozen("measured_kl", measured_kl, np.float64, (len(plans),))
    if len(plans) < 3:
        raise InputError(f"plans: {len(plans)} is below 3, the least that can be ranked")
    if not (np.isfinite(kl) & (kl > 0)).all():
        index = int((~(np.isfinite(kl) & (kl > 0))).argmax())
        raise InputError(f"measured_kl[{index}]: {kl[index]} is not a finite number above 0")
    predicted = np.array([_cost(table, index, plan) for index, plan in enumerate(plans)])
    if not (np.isfinite(predicted) & (predicted > 0)).all():
        index = int((~(np.isfinite(predicted) & (predicted > 0))).argmax())
        raise InputError(
            f"plans[{index}]: the table gives it {predicted[index]}; check plans that it allows "
            "and that round something"
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

    The first plan is the problem's solution. Of the others, every second solves it with each row's
    costs multiplied by a lognormal number (deviation 0.5 of the log), so it is near the
    frontier; the rest solve made-up costs that know nothing of the table but its mean over units,
    multiplied likewise (deviation 2). Bytes differ by what the last step leaves. All are distinct;
    fewer come back only when the limits leave no more.

    Args:
        problem: a table and limits; a budget that binds, or all plans are the widest.
        count: how many, at least 3.
        seed: random seed of the draws.

    Raises:
        InputError: `count` is below 3.
        InfeasibleError: no plan is within the limits.
    """
    if count < 3:
        raise InputError(f"count: {count} is below 3, the least that can be ranked")
    generator = np.random.default_rng(seed)
    found = [solve(problem, _SOLVER).plan]
    seen = {found[0].choice.tobytes()}
    blank = _blank(problem.table)
    for _ in range(_DRAWS * count):
        if len(found) == count:
            break
        near = len(found) % 2 == 1
        noise = generator.standard_normal(len(problem.cost))[problem.row_of]
        factor = np.exp((_NEAR if near else _FAR) * noise)[:, None]
        cost = (problem.table.cost if near else blank) * factor
        plan = solve(Problem(replace(problem.table, cost=cost), problem.limits), _SOLVER).plan
        if plan.choice.tobytes() not in seen:
            seen.add(plan.choice.tobytes())
            origin = {"solver": "near the frontier" if near else "random", "seed": seed}
            found.append(replace(plan, header={**origin, "limits": plan.header["limits"]}))
    return tuple(found)


def _blank(table: CostTable) -> Floats:
    """Return costs that are alike for all units but for their size; what is forbidden stays so."""
    size = table.units.numel if table.units.has_shapes else np.ones(len(table.units))
    allowed = np.isfinite(table.cost)
    total = np.where(allowed, table.cost, 0.0).sum(axis=0)
    mean = total / np.maximum((allowed * size[:, None]).sum(axis=0), 1)
    return np.where(allowed, size[:, None] * mean, np.inf)


def _cost(table: CostTable, index: int, plan: BitPlan) -> float:
    if not table.units.same_as(plan.units):
        raise MismatchError(
            f"plans[{index}]: its {len(plan.units)} units are not the {len(table.units)} of the "
            "table; check plans of the same model, in the table's order"
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
