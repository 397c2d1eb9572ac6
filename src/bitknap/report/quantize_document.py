"""Document for the page of a quantize run: its plan, and the run's facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitknap.allocation import ROLES, BitPlan, CostTable
from bitknap.allocation.refinement.history import Step
from bitknap.allocation.tradeoffs.frontier_path import frontier
from bitknap.allocation.tradeoffs.profile_price import Price, priced

# Points of the predicted frontier.
POINTS = 60


def document_of(
    name: str,
    plan: BitPlan,
    about: Mapping[str, Any],
    table: CostTable | None = None,
    prices: Sequence[Price] = (),
    steps: Sequence[Step] | None = None,
) -> dict[str, Any]:
    """Return the document that `report` reads, JSON values.

    Args:
        name: name of the budget.
        plan: the plan of the run.
        about: facts about the run.
        table: the costs, if known.
        prices: prices of all profiles, if asked for.
        steps: plans that the closed loop measured.
    """
    units = plan.units
    said = {
        **about,
        "fingerprint": plan.model,
        "units": len(units),
        "weights": int(units.numel.sum()),
        "formats": [plan.formats[at].name for at in np.unique(plan.choice)],
    }
    document: dict[str, Any] = {
        "about": said,
        "budgets": [{"budget": name, "bytes": plan.total_bytes}],
    }
    if table is not None:
        said["calibration_tokens"] = table.provenance.get("tokens")
        document["coverage"] = coverage_of(table)
    if prices:
        document |= priced(tuple(prices), str(about.get("profile")))
    if steps is not None:
        document["refine"] = {name: steps_of(steps)}
    return document


def frontier_points(table: CostTable) -> list[dict[str, Any]]:
    """Return the predicted costs of plans at several budgets, JSON values."""
    return [
        {
            "bits_per_weight": point.bits_per_weight,
            "bytes": point.nbytes,
            "cost": point.cost,
        }
        for point in frontier(table).points(POINTS)
    ]


def coverage_of(table: CostTable) -> dict[str, Any]:
    """Return how many calibration tokens each expert saw; empty if not known."""
    units, tokens = table.units, table.provenance.get("tokens")
    routed = np.flatnonzero(units.role == ROLES.index("routed"))
    if table.frequency is None or not tokens or not len(routed):
        return {}
    layers = np.unique(units.layer[routed])
    seen = np.zeros((len(layers), int(units.expert[routed].max()) + 1), dtype=np.int64)
    at = np.searchsorted(layers, units.layer[routed])
    seen[at, units.expert[routed]] = np.rint(table.frequency[routed] * int(tokens))
    return {"layers": layers.tolist(), "tokens": seen.tolist()}


def steps_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the plans that the closed loop measured, JSON values."""
    return [
        {
            "origin": step.origin,
            "predicted": step.predicted,
            "loss": float(step.losses.mean()),
            "blocks": len(step.losses),
            "gain": step.gain,
            "error": step.error,
            "accepted": step.accepted,
        }
        for step in steps
    ]
