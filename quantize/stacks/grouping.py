"""Group units that can be worked on together: stacks, and pieces of stacks that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units

# Bytes of float32 weights processed at a time: many beside a call's cost, few beside a model.
PIECE = 1 << 25


def stacks(units: Units) -> list[np.ndarray]:
    """Return the units in runs that can be worked on together, each int64 [n].

    A stack holds the units of one layer, role, projection and shape: for routed experts, all
    experts of the layer.
    """
    keys = np.stack([units.layer, units.role, units.projection, units.rows, units.cols])
    _, stack_of = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(stack_of, kind="stable")
    cuts = np.flatnonzero(np.diff(stack_of[order])) + 1
    runs = np.split(order, cuts)
    return sorted(runs, key=lambda run: int(run[0]))


def stack_pieces(units: Units, most: int = PIECE) -> list[np.ndarray]:
    """Return `stacks` cut into runs of at most `most` bytes of float32 weights, or of one unit."""
    return [which for run in stacks(units) for which in _in_pieces(run, units, most)]


def _in_pieces(run: np.ndarray, units: Units, most: int) -> list[np.ndarray]:
    size = 4 * int(units.rows[run[0]]) * int(units.cols[run[0]])
    count = max(1, most // max(1, size))
    return np.split(run, range(count, len(run), count))


def plan_pieces(plan: BitPlan) -> Iterator[tuple[np.ndarray, Format]]:
    """Yield runs of a plan's units and their format: `stack_pieces`, split by format."""
    for run in stacks(plan.units):
        choices = plan.choice[run]
        for choice in np.unique(choices):
            for which in _in_pieces(run[choices == choice], plan.units, PIECE):
                yield which, plan.formats[choice]
