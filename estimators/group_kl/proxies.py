"""Proxies under calibration: exponents of signals, fitted on halves of measured groups.

A group's gain says how much its units lose together, but not which of them loses more. So each
group (one projection of one layer) is cut in two by a signal, the KL of both halves is measured,
and the exponents that explain the split are fitted (methods.md#modifiers). They stay 0 unless they
predict left-out halves better than no exponents do. Group totals do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.table import CostTable
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.group_kl.exponents import Fitted, MeasuredGroup, fit_exponents
from bitknap.estimators.signals.scored import standardised
from bitknap.estimators.signals.signal import Signal

# Halves that lose less than this, in nats per token, hold experts without tokens; their logarithm
# is noise.
_LEAST = 1e-7

# Maps groups, each its units and the column of a format, to the KL of each in nats per token.
Measure = Callable[[Sequence[tuple[np.ndarray, int]]], Sequence[float]]


def with_proxies(
    table: CostTable,
    evidence: Evidence,
    signals: Sequence[Signal],
    runs: Sequence[np.ndarray],
    column: int,
    measure: Measure,
) -> CostTable:
    """Return the table with cost × exp(Σ θ z) within each group, and the fit in its provenance.

    Args:
        table: calibrated costs.
        evidence: scores the units.
        signals: at least one.
        runs: the groups, each int64 [n].
        column: the format in which halves are measured; two measurements per group.
        measure: measures the KL of groups.
    """
    z = np.stack([standardised(x.score(evidence), table.units).values for x in signals])
    cut = [half for i, run in enumerate(runs) for half in _halves(run, z[i % len(z)])]
    halves = [
        MeasuredGroup(units=half, format=column, kl=kl)
        for half, kl in zip(cut, measure([(half, column) for half in cut]), strict=True)
    ]
    clear = [group for group in halves if group.kl > max(_LEAST, evidence.floor)]
    names = [signal.name for signal in signals]
    fitted = fit_exponents(table, z, clear, names=names) if clear else None
    better = fitted is not None and fitted.report.error < fitted.report.error_without
    theta = dict(fitted.exponents) if fitted is not None and better else dict.fromkeys(names, 0.0)
    cost, spread = table.cost.copy(), None if table.spread is None else table.spread.copy()
    if better:
        factor = np.exp(np.array([theta[name] for name in names]) @ z)[:, None]
        for run in runs:
            changed = cost[run] * factor[run]
            total = np.maximum(changed.sum(0), 1e-300)
            same = cost[run].sum(0) / total
            cost[run] = changed * same
            if spread is not None:
                spread[run] *= factor[run] * same
    proxies = {"exponents": theta, "halves": len(clear), **_report(fitted)}
    return replace(
        table, cost=cost, spread=spread, provenance={**table.provenance, "proxies": proxies}
    )


def _halves(run: np.ndarray, z: Floats) -> list[np.ndarray]:
    """Cut a group at the median of a signal; a group of one unit has no halves."""
    order = run[np.argsort(z[run], kind="stable")]
    cut = len(order) // 2
    return [np.sort(order[:cut]), np.sort(order[cut:])] if cut else []


def _report(fitted: Fitted | None) -> Mapping[str, Any]:
    """Return the error of log KL on halves left out, with the exponents and without."""
    if fitted is None:
        return {
            "note": "no half of a group lost enough to be distinguished from noise; "
            "exponents stay 0"
        }
    report = fitted.report
    errors = {"error": report.error, "error_without": report.error_without}
    finite = {name: value for name, value in errors.items() if np.isfinite(value)}
    return {**finite, "dropped": list(report.dropped), "note": report.fallback}
