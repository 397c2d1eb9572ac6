"""Sensitivity of a model: a table's costs as maps of layers × experts, one per projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitknap.allocation import CostTable
from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Characters from low to high cost; a terminal shows ten levels well.
_LEVELS = " .:-=+*#%@"
# Columns in a terminal; with more experts, several share a column, which shows the largest cost.
_COLUMNS = 64
# Panels of a picture are side by side up to this many experts, and below each other with more.
_BESIDE = 64
# Costs more than this many powers of ten below the largest look the same.
_DECADES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heat:
    """One projection's map.

    Attributes:
        projection: its name.
        layers: numbers of the layers, int64[L].
        values: log10 of each routed expert's cost, float64[L,E]; NaN where there is no unit. The
            cost is the geometric mean over formats with nonzero cost.
    """

    projection: str
    layers: Longs
    values: Floats


def heat(table: CostTable) -> tuple[Heat, ...]:
    """Return the map of every projection of the routed experts.

    Raises:
        InputError: the table has no routed experts.
    """
    units = table.units
    routed = (units.role == ROLES.index("routed")) & (units.expert >= 0)
    if not routed.any():
        raise InputError("show: the table has no routed experts, so there is no map")
    counted = np.isfinite(table.cost) & (table.cost > 0)
    logs = np.log10(np.where(counted, table.cost, 1.0)).sum(axis=1)
    with np.errstate(invalid="ignore"):
        value = np.where(counted.any(axis=1), logs / counted.sum(axis=1), np.nan)
    layers, row = np.unique(units.layer, return_inverse=True)
    maps = []
    for index, name in enumerate(units.projections):
        mine = np.flatnonzero(routed & (units.projection == index))
        if not len(mine):
            continue
        values = np.full((len(layers), int(units.expert[routed].max()) + 1), -np.inf)
        # Blocks of one matrix share a cell, which shows the most expensive block.
        np.maximum.at(values, (row[mine], units.expert[mine]), value[mine])
        values[np.isneginf(values)] = np.nan
        keep = ~np.isnan(values).all(axis=1)
        maps.append(Heat(projection=name, layers=layers[keep], values=values[keep]))
    return tuple(maps)


def text_of(maps: tuple[Heat, ...]) -> str:
    """Return the maps as lines of text, all on one scale."""
    low, high = _range(maps)
    lines = []
    for one in maps:
        values, experts = _binned(one.values), one.values.shape[1]
        shared = f", about {experts / _COLUMNS:.2g} a mark: the costliest of them"
        lines.append(
            f"{one.projection}: layers down, experts across{shared if experts > _COLUMNS else ''}"
        )
        for layer, row in zip(one.layers.tolist(), values, strict=True):
            marks = "".join(_mark(value, low, high) for value in row.tolist())
            lines.append(f"{layer:4d} |{marks}|")
    lines.append(f"scale '{_LEVELS}': 10^{low:.1f} to 10^{high:.1f}, mean over formats")
    return "\n".join(lines)


def heat_figure(maps: tuple[Heat, ...], unit: str) -> Figure:
    """Draw the maps on one scale, side by side or, for many experts, below each other.

    Args:
        maps: from `heat`.
        unit: unit of the costs.
    """
    from matplotlib.figure import Figure

    low, high = _range(maps)
    count, (tall, wide) = len(maps), maps[0].values.shape
    if wide <= _BESIDE:
        size = (min(3 + count * max(1.6, wide / 16), 16), min(2 + tall / 6, 10))
        shape = (1, count)
    else:
        size = (min(3 + wide / 20, 20), count * min(1 + tall / 12, 5.5))
        shape = (count, 1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).ravel()
    for place, one in zip(axes, maps, strict=True):
        image = place.imshow(
            one.values, aspect="auto", vmin=low, vmax=high, cmap="cividis", interpolation="nearest"
        )
        place.set_title(one.projection)
        step = max(1, len(one.layers) // 12)
        place.set_yticks(range(0, len(one.layers), step), one.layers[::step].tolist())
        if wide > _BESIDE or place is axes[0]:
            place.set_ylabel("layer")
        if wide <= _BESIDE or place is axes[-1]:
            place.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label=f"log10 of cost, {unit}")
    return figure


def _range(maps: tuple[Heat, ...]) -> tuple[float, float]:
    high = max(float(np.nanmax(one.values)) for one in maps)
    low = min(float(np.nanmin(one.values)) for one in maps)
    return max(low, high - _DECADES), high


def _mark(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "?"
    share = (value - low) / (high - low) if high > low else 1.0
    return _LEVELS[round(min(max(share, 0.0), 1.0) * (len(_LEVELS) - 1))]


def _binned(values: Floats) -> Floats:
    if values.shape[1] <= _COLUMNS:
        return values
    cuts = np.linspace(0, values.shape[1], _COLUMNS + 1).astype(int)[:-1]
    largest: Floats = np.fmax.reduceat(values, cuts, axis=1)
    return largest
