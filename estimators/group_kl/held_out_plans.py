"""Held-out plans: does a calibrated table predict the KL of plans that it was not fitted to?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.checks import number
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.variant_kl import kl_of
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.group_kl.rank_check import check_plans, plans_for_check
from bitknap.progress import Progress

# Bits per weight at which tables are checked if feasible: the middle of the range that this library
# is meant for.
USUAL_BITS = 2.5


def on_held_out_plans(
    table: CostTable,
    evidence: Evidence,
    count: int,
    bits: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return how well a table predicts the KL of whole plans, JSON values.

    The plans come from `plans_for_check` at one budget, without ties; the KL is measured on the
    calibration text. The seed is the evidence's. `PlanCheck` explains the numbers; one that cannot
    be computed is None.

    Args:
        table: the costs.
        evidence: with the means to measure KL.
        count: number of plans, at least 3.
        bits: the budget in bits per weight; when not given 2.5, or the middle of the feasible range
            if 2.5 is outside it.
        progress: called with (what, done, of).

    Raises:
        InputError: nothing can measure KL, `count` is below 3, or fewer than 3 plans differ.
        InfeasibleError: no plan is that small.
    """
    budget = _bits(table) if bits is None else number("check_bits", bits)
    seed = int(evidence.provenance.get("seed", 0))
    plans = plans_for_check(Problem(table, Budget.bits(budget)), count, seed)
    if len(plans) < 3:
        raise InputError(
            f"check: only {len(plans)} different plans exist at {budget:.4g} bpw, 3 are needed; "
            "add formats, or check at another budget"
        )
    measured = [math.nan] * len(plans)
    if progress:
        progress("check plans", 0, len(plans))
    variants = [Variant.plan(plan) for plan in plans]
    for done, (which, kl) in enumerate(kl_of(evidence, variants), start=1):
        measured[which] = max(kl, evidence.floor)
        if progress:
            progress("check plans", done, len(plans))
    result = check_plans(table, plans, measured)
    numbers = {
        "spearman": result.spearman,
        "slope": result.slope,
        "scale": result.scale,
        "regret": result.regret,
    }
    known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"plans": len(plans), "bits": budget, **known}


def _bits(table: CostTable) -> float:
    """Return the usual bits per weight if they bind, else the middle of the feasible range."""
    allowed = np.isfinite(table.cost)
    least = np.where(allowed, table.nbytes, np.inf).min(axis=1).sum()
    most = np.where(allowed, table.nbytes, 0).max(axis=1).sum()
    low, high = (8 * float(size) / table.weights for size in (least, most))
    return USUAL_BITS if low < USUAL_BITS < high else (low + high) / 2
