"""Made-up units, cost tables and plans, for tests; needs NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from bitknap.allocation import BitPlan, CostTable, Format, Units

__all__ = ["mixed_plan", "random_plan", "random_table", "routed_units"]


def routed_units(
    layers: int,
    experts: int,
    projections: Sequence[str] = ("gate", "down"),
    *,
    rows: int = 16,
    cols: int = 16,
) -> Units:
    """Return units of equal size, ordered by layer, expert and projection."""
    places = [*product(range(layers), range(experts), projections)]
    layer, expert, projection = zip(*places, strict=True)
    return Units.build(
        layer=layer,
        role=["routed"] * len(places),
        expert=expert,
        projection=projection,
        rows=[rows] * len(places),
        cols=[cols] * len(places),
    )


def random_table(units: Units, formats: Sequence[Format], seed: int = 0) -> CostTable:
    """Return a table of random costs; each additional bit divides a unit's cost by 4."""
    scale = np.random.default_rng(seed).lognormal(size=(len(units), 1))
    cost = scale * np.array([4.0**-item.bits for item in formats])
    return CostTable.from_arrays(cost, units=units, formats=formats)


def random_plan(
    units: Units,
    formats: Sequence[Format],
    seed: int = 0,
    *,
    model: str = "",
    header: Mapping[str, Any] | None = None,
) -> BitPlan:
    """Return a plan that draws each unit's format by itself."""
    choice = np.random.default_rng(seed).integers(0, len(formats), len(units))
    return BitPlan.from_choice(units, formats, choice, model=model, header=header)


def mixed_plan(
    units: Units, formats: Sequence[Format], seed: int = 0, *, model: str = ""
) -> BitPlan:
    """Return a plan that has each format about equally often, the first unit in the last one."""
    choice = np.random.default_rng(seed).permutation(np.arange(len(units)) % len(formats))
    choice[0] = len(formats) - 1
    return BitPlan.from_choice(units, formats, choice, model=model)
