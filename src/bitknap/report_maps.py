"""Maps of layers × experts in a report: the bits of a plan, and the tokens that experts saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitknap.allocation import ROLES, BitPlan
from bitknap.allocation.arrays import Bools, Floats
from bitknap.report_plots import decades, words

_ROUTED = ROLES.index("routed")
_ORDER = ("gate", "up", "down")
# Panels stand side by side up to so many experts, below each other beyond.
_BESIDE = 32
# Pixels of a layer's row, and of all that is around a panel.
_ROW, _LEAST, _MOST, _AROUND = 12, 110, 420, 90
# From few to many: seen by everyone, and on light and dark paper.
_SCALE = "Cividis"
_NONE = "#D55E00"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """One map.

    Attributes:
        title: what it is of, such as "gate".
        layers: labels of the rows.
        columns: labels of the columns; numbers of experts unless `other`.
        values: bits per weight with scales and zeros, float64[L,E]; NaN where there is no unit.
        names: names of the formats, "" where there is no unit.
        other: whether the columns are units that are not routed.
    """

    title: str
    layers: list[str]
    columns: list[str]
    values: Floats
    names: list[list[str]]
    other: bool = False


def panels(plan: BitPlan) -> tuple[Panel, ...]:
    """Return the map of every projection of the routed experts, and one of all other units."""
    units = plan.units
    routed = (units.role == _ROUTED) & (units.expert >= 0)
    known = {name: index for index, name in enumerate(units.projections)}
    ordered = [*(n for n in _ORDER if n in known), *(n for n in known if n not in _ORDER)]
    found = []
    for name in ordered:
        mine = routed & (units.projection == known[name])
        if mine.any():
            columns = np.arange(int(units.expert[routed].max()) + 1)
            labels = [str(column) for column in columns]
            found.append(_panel(plan, mine, units.expert, name, labels, other=False))
    rest = ~routed
    if rest.any():
        kinds = units.role.astype(np.int64) * len(units.projections) + units.projection
        some, column = np.unique(kinds, return_inverse=True)
        labels = []
        for kind in some.tolist():
            role, projection = divmod(kind, len(units.projections))
            labels.append(f"{ROLES[role]} {units.projections[projection]}")
        used = np.unique(column[rest])
        place = np.searchsorted(used, column)
        found.append(
            _panel(plan, rest, place, "other units", [labels[i] for i in used], other=True)
        )
    return tuple(found)


def plan_figure(plan: BitPlan, low: float, high: float) -> tuple[Any, int] | None:
    """Return the maps of a plan and their height in pixels, or None without shapes of units.

    Args:
        plan: any.
        low: bits per weight of the darkest colour, so that plans can be compared.
        high: of the brightest.
    """
    from plotly.subplots import make_subplots

    maps = panels(plan) if plan.units.has_shapes else ()
    if not maps:
        return None
    beside = all(len(panel.columns) <= _BESIDE for panel in maps)
    rows, columns = (1, len(maps)) if beside else (len(maps), 1)
    tall = [min(max(_LEAST, _ROW * len(panel.layers)), _MOST) for panel in maps]
    height = (max(tall) if beside else sum(tall) + 60 * (rows - 1)) + _AROUND
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[words(panel.title) for panel in maps],
        horizontal_spacing=0.06,
        vertical_spacing=0 if beside else 60 / (height - _AROUND),
        row_heights=None if beside else tall,
    )
    for index, panel in enumerate(maps):
        place = {"row": 1, "col": index + 1} if beside else {"row": index + 1, "col": 1}
        figure.add_heatmap(**_heatmap(panel), coloraxis="coloraxis", **place)
        _axes(figure, panel, place)
    bar = {"title": {"text": "bits per<br>weight"}, "thickness": 12, "outlinewidth": 0}
    figure.update_layout(
        coloraxis={"colorscale": _SCALE, "cmin": low, "cmax": high, "colorbar": bar}
    )
    return figure, height


def bits_range(plans: Sequence[BitPlan]) -> tuple[float, float]:
    """Return the least and the most bits per weight of any unit of some plans."""
    sizes = [8 * plan.nbytes / np.maximum(plan.units.numel, 1) for plan in plans]
    low = min((float(size.min()) for size in sizes), default=0.0)
    return low, max((float(size.max()) for size in sizes), default=1.0)


def coverage_figure(coverage: Mapping[str, Any]) -> tuple[Any, int, int] | None:
    """Return a map of the tokens routed to each expert, its height, and how many experts saw none.

    None where the document has no tokens.
    """
    from plotly import graph_objects as go

    rows = [list(row) for row in coverage.get("tokens") or ()]
    if not rows or not any(rows):
        return None
    layers = [str(layer) for layer in coverage.get("layers") or range(len(rows))]
    tokens = np.full((len(rows), max(map(len, rows))), np.nan)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = [math.nan if value is None else value for value in row]
    seen = tokens[tokens > 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(tokens > 0, np.log10(tokens), np.nan)
    at, text = decades(seen.tolist()) if len(seen) else ([0.0], ["1"])
    bar = {"title": {"text": "tokens"}, "tickvals": at, "ticktext": text}
    figure = go.Figure(
        go.Heatmap(
            z=logs.astype(np.float32),
            y=layers,
            customdata=np.nan_to_num(tokens).astype(np.int32),
            colorscale=_SCALE,
            colorbar={**bar, "thickness": 12, "outlinewidth": 0},
            hoverongaps=False,
            hovertemplate="layer %{y}, expert %{x}: %{customdata:,} tokens<extra></extra>",
            **_gaps(tokens.shape[1]),
        )
    )
    unseen = np.argwhere(tokens == 0)
    if len(unseen):
        figure.add_scatter(
            x=unseen[:, 1].tolist(),
            y=[layers[layer] for layer in unseen[:, 0].tolist()],
            mode="markers",
            marker={"symbol": "x", "color": _NONE, "size": 7 if tokens.shape[1] <= _BESIDE else 5},
            hovertemplate="layer %{y}, expert %{x}: no tokens<extra></extra>",
            name="no tokens",
        )
    figure.update_xaxes(title="expert", showgrid=False, zeroline=False, tickformat="d")
    figure.update_yaxes(**_LAYERS)
    height = min(max(_LEAST, _ROW * len(rows)), _MOST) + _AROUND
    return figure, height, len(unseen)


_LAYERS = {
    "title": "layer",
    "type": "category",
    "autorange": "reversed",
    "showgrid": False,
    "zeroline": False,
}


def _panel(
    plan: BitPlan, mine: Bools, column: Any, title: str, labels: list[str], *, other: bool
) -> Panel:
    units = plan.units
    layers, row = np.unique(units.layer[mine], return_inverse=True)
    shape = (len(layers), len(labels))
    flat = row * shape[1] + column[mine]
    count = shape[0] * shape[1]
    # Blocks of one matrix share a place.
    nbytes = np.bincount(flat, weights=plan.nbytes[mine], minlength=count)
    weights = np.bincount(flat, weights=units.numel[mine], minlength=count)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(weights > 0, 8 * nbytes / weights, np.nan).reshape(shape)
    names = [""] * count
    formats = [item.name for item in plan.formats]
    for place, choice in zip(flat.tolist(), plan.choice[mine].tolist(), strict=True):
        name = formats[choice]
        if name not in names[place].split(", "):
            names[place] += f", {name}" if names[place] else name
    return Panel(
        title=title,
        layers=["none" if layer < 0 else str(layer) for layer in layers.tolist()],
        columns=labels,
        values=values,
        names=[names[start : start + shape[1]] for start in range(0, count, shape[1])],
        other=other,
    )


def _heatmap(panel: Panel) -> dict[str, Any]:
    what = "%{x}" if panel.other else "expert %{x}"
    columns = {"x": [words(name) for name in panel.columns]} if panel.other else {}
    return {
        "z": panel.values.astype(np.float32),
        "y": panel.layers,
        "text": panel.names,
        "hoverongaps": False,
        "hovertemplate": f"layer %{{y}}, {what}<br>%{{text}}<br>%{{z:.3f}} bpw"
        f"<extra>{words(panel.title)}</extra>",
        **columns,
        **_gaps(len(panel.columns)),
    }


def _axes(figure: Any, panel: Panel, place: Mapping[str, int]) -> None:
    plain = {"showgrid": False, "zeroline": False}
    if panel.other:
        figure.update_xaxes(type="category", automargin=True, **plain, **place)
    else:
        figure.update_xaxes(title="expert", tickformat="d", **plain, **place)
    first = place["col"] == 1
    figure.update_yaxes(**{**_LAYERS, "title": "layer" if first else None}, **place)


def _gaps(columns: int) -> dict[str, int]:
    """Return the space between cells: none where they are a few pixels wide."""
    return {"xgap": 1, "ygap": 1} if columns <= _BESIDE else {}
