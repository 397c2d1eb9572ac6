"""Common manual recipes: more bits for the first layers, or for down projections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from bitknap.allocation import BitPlan, Format, Units
from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.table import storage
from bitknap.estimators.published.rule import Offer


def first_layers(units: Units) -> Longs:
    """Return the units in the order in which first layers get more bits, int64[U]."""
    return np.lexsort((units.expert, units.projection, units.layer))


def down_first(units: Units) -> Longs:
    """Return the units in the order in which down projections get more bits, int64[U]."""
    names = np.array([name in ("down", "w2", "wo") for name in units.projections])
    other = ~names[units.projection]
    return np.lexsort((units.expert, units.projection, units.layer, other))


def offers(
    units: Units, formats: Sequence[Format], order: Longs, nbytes: int, model: str
) -> list[Offer]:
    """Return plans that mix two neighbouring widths of a format family, for every family.

    Each gives the wider format to as many units as fit, in the given order.

    Args:
        units: the units.
        formats: the options.
        order: units in the order in which they get the wider format, int64[U].
        nbytes: maximum size.
        model: fingerprint, for the plans.
    """
    families: dict[tuple[int, bool, str], list[Format]] = {}
    for item in sorted(formats, key=lambda item: item.bits):
        families.setdefault((item.group_size, item.symmetric, item.metadata), []).append(item)
    plans = []
    for family in families.values():
        sizes = storage(units, family).sum(0)
        pairs = [
            (low, high)
            for (low, small), (high, large) in pairwise(zip(family, sizes, strict=True))
            if small <= nbytes < large
        ]
        if (len(family) == 1 and sizes[0] <= nbytes) or sizes[-1] <= nbytes:
            pairs.append((family[-1], family[-1]))
        plans += [_prefix(units, low, high, order, nbytes, model) for low, high in pairs]
    return plans


def _prefix(
    units: Units, low: Format, high: Format, order: Longs, nbytes: int, model: str
) -> Offer:
    small, large = storage(units, (low, high)).T
    total = small.sum() + np.cumsum((large - small)[order])
    choice = np.zeros(len(units), dtype=np.int32)
    if low != high:
        choice[order[: int(np.searchsorted(total, nbytes, side="right"))]] = 1
    formats = (low,) if low == high else (low, high)
    plan = BitPlan.from_choice(units, formats, choice, model=model)
    return Offer(plan, " + ".join(item.name for item in formats))
