"""Uniform recipes: the usual choice without an allocator, and the baseline at equal bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import storage
from bitknap.allocation.problem.units import Units

# A format this much larger than the budget still counts as fitting it, in the recipe's favour.
_CLOSE = 1.02
# Share of the limit that a recipe must use to count, unless none uses that much.
_FULL = 0.95


def uniform_plans(
    units: Units, formats: Sequence[Format], nbytes: int, model: str = ""
) -> list[BitPlan]:
    """Return every uniform recipe that a user might use for a budget of `nbytes`.

    For each family (group size, zero point, metadata): the widest format within the budget; the
    next one if it is at most 2 % over; otherwise a round robin of the two over the units that
    takes `nbytes` or a little more.
    """
    families: defaultdict[tuple[int, bool, str], list[Format]] = defaultdict(list)
    for item in formats:
        if item.kind == "grid":
            families[item.group_size, item.symmetric, item.metadata].append(item)
    plans = []
    for family in families.values():
        ordered = sorted(family, key=lambda item: item.bits)
        sizes = storage(units, ordered).sum(0)
        below = [i for i in range(len(ordered)) if sizes[i] <= nbytes]
        above = [i for i in range(len(ordered)) if sizes[i] > nbytes]
        if below:
            plans.append(BitPlan.uniform(units, ordered[below[-1]], model))
        if above and sizes[above[0]] <= _CLOSE * nbytes:
            plans.append(BitPlan.uniform(units, ordered[above[0]], model))
        elif above and below:
            plans.append(round_robin(units, ordered[below[-1]], ordered[above[0]], nbytes, model))
    return plans


def uniform_plans_within(
    units: Units, formats: Sequence[Format], nbytes: int, model: str = ""
) -> list[BitPlan]:
    """Return the uniform recipes of at most `nbytes`; none if no format is small enough.

    Recipes that leave over a twentieth of the bytes unused are dropped if others use more.
    """
    plans = []
    for plan in uniform_plans(units, formats, nbytes, model):
        if plan.total_bytes > nbytes and len(plan.formats) == 2:
            low, high = plan.formats
            small, large = storage(units, (low, high)).T
            plan = round_robin(units, low, high, nbytes - int((large - small).max()), model)
        if plan.total_bytes <= nbytes:
            plans.append(plan)
    full = [plan for plan in plans if plan.total_bytes > _FULL * nbytes]
    return full or plans


def round_robin(units: Units, low: Format, high: Format, nbytes: int, model: str = "") -> BitPlan:
    """Give `high` to the fewest evenly spaced units that bring the plan to `nbytes` or more."""
    small, large = storage(units, (low, high)).T
    count = len(units)
    # Units in the order of a golden-ratio (van der Corput-like) sequence: every prefix is spread
    # evenly over layers, experts and projections.
    order = np.argsort((np.arange(count) * 0.6180339887498949) % 1.0, kind="stable")
    total = small.sum() + np.cumsum((large - small)[order])
    enough = int(np.searchsorted(total, nbytes)) + 1
    choice = np.zeros(count, dtype=np.int32)
    choice[order[:enough]] = 1
    return BitPlan.from_choice(
        units, (low, high), choice, model=model, header={"solver": "round-robin"}
    )
