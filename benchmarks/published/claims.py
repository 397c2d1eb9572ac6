"""Claims of papers about sensitivity, checked on a model: confirmed, refuted or not decidable.

A claim about ranks is decided by the mean of the layers' rank correlations, once that is two
standard deviations from 0; for one layer, the deviation is 1 / sqrt(n − 1) if the ranks of its n
experts are independent (exact for Spearman's without ties). A claim about plans is
decided by paired differences of KL: more budgets at which they are two standard errors above 0
than below, or the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitknap.allocation import Budget, CostTable
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.published.chowdhury import norm_changes
from bitknap.benchmarks.setting import BUDGETS, FORMATS, Judge
from bitknap.estimators.group_kl.regression import rank_correlation
from bitknap.estimators.measuring.kl_replay import Losses, standard_error
from bitknap.estimators.published import chowdhury
from bitknap.estimators.published.mc_moe import Frequency
from bitknap.estimators.published.rule import Material
from bitknap.estimators.published.xie import down_needs_more
from bitknap.estimators.signals.scored import Scored

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "not decidable"
# Width at which costs of experts are compared, and bits per weight of the plan for down.
WIDTH, DOWN_BITS = 2, 2.5
# Standard deviations that decide a claim.
_SURE = 2.0


def claims(
    judge: Judge, known: Material, ours: CostTable, budgets: Sequence[float] = BUDGETS
) -> list[dict[str, Any]]:
    """Return the verdict on each claim, as JSON values.

    Args:
        judge: measures plans.
        known: the inputs of rules.
        ours: the calibrated costs.
        budgets: bits per weight of the plans with and without the subject of a claim.
    """
    verdicts = [_down(ours)]
    change = norm_changes(known.final, known.initial)
    if known.initial is not None:
        verdicts.append(_norms("small change of router norm, more bits", change, known, ours))
    verdicts.append(_norms("small final router norm, more bits", known.final, known, ours))
    verdicts.append(_max_var(judge, known, ours, budgets))
    return [*verdicts, _frequency(judge, known, ours, budgets)]


def decided(value: float, deviation: float) -> str:
    """Return the verdict on a claim that a value is above 0."""
    if abs(value) <= _SURE * deviation or not np.isfinite(value):
        return UNDECIDED
    return CONFIRMED if value > 0 else REFUTED


def by_budgets(better: int, worse: int) -> str:
    """Return the verdict on a claim that plans get better, from the counts of decisive budgets."""
    if better == worse:
        return UNDECIDED
    return CONFIRMED if better > worse else REFUTED


def _down(ours: CostTable) -> dict[str, Any]:
    report = down_needs_more(ours, DOWN_BITS)
    agree = report.holds and report.share > 0.5
    against = not report.holds and report.share < 0.5
    return {
        "claim": "down projections need more bits than up projections",
        "source": "Xie et al.",
        "verdict": CONFIRMED if agree else REFUTED if against else UNDECIDED,
        "figures": {
            "budget": DOWN_BITS,
            "at": report.format.name,
            "ratio": report.ratio.tolist(),
            "bits_up": report.bits["up"].tolist(),
            "bits_down": report.bits["down"].tolist(),
        },
    }


def _norms(
    claim: str, norms: Mapping[int, Any], known: Material, ours: CostTable
) -> dict[str, Any]:
    """Check that costs of experts fall as router norms rise."""
    cost = expert_costs(ours)
    layers = {
        number: [-np.asarray(norms[number], dtype=np.float64), cost[number]] for number in cost
    }
    return {
        "claim": claim,
        "source": "Chowdhury et al.",
        **_ranks(layers, known),
        "also": "rank correlation of minus the norm with the calibrated cost",
    }


def _ranks(pairs: Mapping[int, Sequence[Floats]], known: Material) -> dict[str, Any]:
    """Return the verdict on a positive rank correlation within layers, idle experts left out."""
    correlations, variance = [], []
    for number, (first, second) in pairs.items():
        seen = known.evidence.layers[number].count.numpy() > 0
        if seen.sum() > 2:
            correlations.append(rank_correlation(first[seen], second[seen]))
            variance.append(1 / (int(seen.sum()) - 1))
    mean = float(np.mean(correlations)) if correlations else float("nan")
    deviation = float(np.sqrt(np.sum(variance)) / max(1, len(correlations)))
    return {
        "verdict": decided(mean, deviation),
        "figures": {"correlation": correlations, "mean": mean, "deviation": deviation},
    }


def expert_costs(ours: CostTable) -> dict[int, Floats]:
    """Return the cost of every expert at 2 bits, over all its matrices, by layer float64[E]."""
    units = ours.units
    column = [item.bits for item in ours.formats].index(WIDTH)
    totals: dict[int, Floats] = {}
    for number in np.unique(units.layer).tolist():
        here = units.layer == number
        totals[number] = np.zeros(int(units.expert[here].max()) + 1)
        np.add.at(totals[number], units.expert[here], ours.cost[here, column])
    return totals


def _max_var(
    judge: Judge, known: Material, ours: CostTable, budgets: Sequence[float]
) -> dict[str, Any]:
    """Check that MaxVar reordering makes the plans of Chowdhury et al. better."""
    named = {rule.name: rule for rule in chowdhury.variations(known)}
    pairs = []
    moved = []
    for bits in budgets:
        limit = int(Budget.bits(bits).limit(ours).bound)
        with_, without = (
            named[name].offers(limit) for name in ("Chowdhury", "Chowdhury, norms alone")
        )
        if with_ and without:
            moved.append(int(with_[0].plan.header["displaced"]))
            pairs.append(_pair(bits, judge.of(without[0].plan), judge.of(with_[0].plan)))
    return {
        "claim": "MaxVar reordering makes plans better",
        "source": "Chowdhury et al.",
        **_plans(pairs),
        "also": f"{max(moved, default=0)} experts changed places",
    }


def _frequency(
    judge: Judge, known: Material, ours: CostTable, budgets: Sequence[float]
) -> dict[str, Any]:
    """Check the sign of frequency: costs of experts, and plans by frequency and its inverse."""
    cost = expert_costs(ours)
    layers = known.evidence.layers
    pairs = {number: [layers[number].count.double().numpy(), cost[number]] for number in cost}
    rank = _ranks(pairs, known)
    up, down = (
        Scored(Frequency(), exponent=exponent).estimate(known.evidence, FORMATS)
        for exponent in (1.0, -1.0)
    )
    plan_pairs = [_pair(b, judge.losses(down, b)[1], judge.losses(up, b)[1]) for b in budgets]
    plans = _plans(plan_pairs)
    verdicts = {rank["verdict"], plans["verdict"]}
    return {
        "claim": "frequent experts need more bits (PMQ, FRI-MxMoE), not rare ones (Chowdhury)",
        "source": "methods that multiply by frequency",
        "verdict": verdicts.pop() if len(verdicts) == 1 else UNDECIDED,
        "figures": {**rank["figures"], **plans["figures"]},
        "also": "rank correlation with the calibrated cost; plans by frequency over its inverse",
    }


def _pair(bits: float, without: Losses, with_: Losses) -> dict[str, float]:
    """Return the KL of plans without and with the subject of a claim."""
    paired = without.kl - with_.kl
    return {
        "budget": bits,
        "without": float(without.kl.mean()),
        "with": float(with_.kl.mean()),
        "gain": float(paired.mean()),
        "gain_se": standard_error(paired) if paired.any() else 0.0,
    }


def _plans(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the verdict on plans that are claimed to gain."""
    sure = [row for row in rows if abs(row["gain"]) > _SURE * row["gain_se"]]
    better = sum(row["gain"] > 0 for row in sure)
    return {
        "verdict": by_budgets(better, len(sure) - better),
        "figures": {"plans": [dict(row) for row in rows]},
    }
