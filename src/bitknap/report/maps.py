"""Maps of layers × experts in a report: the bits of a plan, and the tokens that experts saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitknap.allocation import ROLES, BitPlan
from bitknap.allocation.problem.arrays import Bools, Floats
from bitknap.report.plots import calm, decades, words

_ROUTED = ROLES.index("routed")
_ORDER = ("gate", "up", "down")
# Panels are side by side up to this many experts, and below each other with more.
_BESIDE = 16
# Pixels: height of a layer's row, bounds of a panel's height, space around and between panels.
_ROW, _LEAST, _MOST, _AROUND, _BETWEEN = 24, 140, 300, 90, 72
# Readable for colour-blind readers, and on light and dark backgrounds.
_SCALE = "Viridis"
# Ticks of the colour bar. Colours are logarithmic, or 2 and 3 bits would look alike beside 16.
_MARKED = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
_BAR = {"thickness": 12, "outlinewidth": 0, "ypad": 0, "tickfont": {"size": 11}}
_NONE = "#D55E00"
# Column names up to this many characters are written horizontally.
_SHORT = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """One map.

    Attributes:
        title: subject of the map, such as "gate".
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
    """Return a map for each projection of the routed experts, and one for all other units."""
    units = plan.units
    routed = (units.role == _ROUTED) & (units.expert >= 0)
    known = {name: index for index, name in enumerate(units.projections)}
    ordered = [*(n for n in _ORDER if n in known), *(n for n in known if n not in _ORDER)]
    maps = []
    for name in ordered:
        mine = routed & (units.projection == known[name])
        if mine.any():
            columns = np.arange(int(units.expert[routed].max()) + 1)
            labels = [str(column) for column in columns]
            maps.append(_panel(plan, mine, units.expert, name, labels, other=False))
    if not routed.all():
        maps.append(_others(plan, ~routed))
    return tuple(maps)


def plan_figure(plan: BitPlan, low: float, high: float) -> tuple[Any, int] | None:
    """Return the maps of a plan and their height in pixels; None if units have no shapes.

    Args:
        plan: the plan.
        low: bits per weight of the darkest colour; give all plans the same range to compare them.
        high: bits per weight of the brightest colour.
    """
    from plotly.subplots import make_subplots

    maps = panels(plan) if plan.units.has_shapes else ()
    if not maps:
        return None
    beside = all(len(panel.columns) <= _BESIDE for panel in maps)
    rows, columns = (1, len(maps)) if beside else (len(maps), 1)
    tall = [min(max(_LEAST, _ROW * len(panel.layers)), _MOST) for panel in maps]
    height = (max(tall) if beside else sum(tall) + _BETWEEN * (rows - 1)) + _AROUND
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[words(panel.title) for panel in maps],
        horizontal_spacing=0.06,
        vertical_spacing=0 if beside else _BETWEEN / (height - _AROUND),
        row_heights=None if beside else tall,
    )
    for index, panel in enumerate(maps):
        place = {"row": 1, "col": index + 1} if beside else {"row": index + 1, "col": 1}
        figure.add_heatmap(**_heatmap(panel), coloraxis="coloraxis", **place)
        _axes(
            figure, panel, place, labelled=not beside or panel.layers != maps[0].layers or not index
        )
    figure.update_layout(coloraxis=_colours(low, high))
    figure.update_annotations(font_size=13)
    calm(figure)
    return figure, height


def _colours(low: float, high: float) -> dict[str, Any]:
    marks = [bits for bits in _MARKED if low - 1e-9 <= bits <= high + 1e-9]
    if len(marks) < 2:
        marks = sorted({low, high})
    bar = {"tickvals": np.log2(marks).tolist(), "ticktext": [f"{bits:.4g}" for bits in marks]}
    # A plan with a single width also needs a range of colours.
    margin = 0.0 if low < high else 0.1
    return {
        "colorscale": _SCALE,
        "cmin": math.log2(low) - margin,
        "cmax": math.log2(high) + margin,
        "colorbar": _BAR | bar,
    }


def bits_range(plans: Sequence[BitPlan]) -> tuple[float, float]:
    """Return the least and the most bits per weight of any unit of some plans."""
    sizes = [8 * plan.nbytes / plan.units.numel for plan in plans if plan.units.has_shapes]
    positive = [size[size > 0] for size in sizes if (size > 0).any()]
    low = min((float(size.min()) for size in positive), default=1.0)
    return low, max((float(size.max()) for size in positive), default=1.0)


def coverage_figure(coverage: Mapping[str, Any]) -> tuple[Any, int, int] | None:
    """Return a map of the tokens routed to each expert, its height, and how many experts saw none.

    None if the document has no token counts.
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
    figure = go.Figure(
        go.Heatmap(
            z=logs.astype(np.float32),
            y=layers,
            customdata=np.nan_to_num(tokens).astype(np.int32),
            colorscale=_SCALE,
            colorbar=_BAR | {"tickvals": at, "ticktext": text},
            hoverongaps=False,
            hovertemplate="layer %{y}, expert %{x}: %{customdata:,} tokens<extra></extra>",
            **_gaps(tokens.shape),
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
    # Crosses would make the axes wider than the map.
    figure.update_xaxes(range=[-0.5, tokens.shape[1] - 0.5])
    figure.update_yaxes(**_LAYERS | {"autorange": False, "range": [len(rows) - 0.5, -0.5]})
    height = min(max(_LEAST, _ROW * len(rows)), _MOST) + _AROUND
    return calm(figure), height, len(unseen)


_LAYERS = {
    "title": "layer",
    "type": "category",
    "autorange": "reversed",
    "showgrid": False,
    "zeroline": False,
}


def _others(plan: BitPlan, rest: Bools) -> Panel:
    """Return the map of units that are not routed, with a column for each role and projection."""
    units = plan.units
    kinds = units.role.astype(np.int64) * len(units.projections) + units.projection
    some = np.unique(kinds[rest])
    roles, names = some // len(units.projections), some % len(units.projections)
    labels = [units.projections[name] for name in names.tolist()]
    title = ROLES[roles[0]]
    if len(set(roles.tolist())) > 1:
        title = "other units"
        labels = [
            f"{ROLES[role]} {name}" if name != ROLES[role] else name
            for role, name in zip(roles.tolist(), labels, strict=True)
        ]
    return _panel(plan, rest, np.searchsorted(some, kinds), title, labels, other=True)


def _panel(
    plan: BitPlan, mine: Bools, column: Any, title: str, labels: list[str], *, other: bool
) -> Panel:
    units = plan.units
    layers, row = np.unique(units.layer[mine], return_inverse=True)
    shape = (len(layers), len(labels))
    flat = row * shape[1] + column[mine]
    count = shape[0] * shape[1]
    # Blocks of one matrix share a cell.
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
    empty = np.full(panel.values.shape, np.nan)
    what = "%{x}" if panel.other else "expert %{x}"
    columns = {"x": [words(name) for name in panel.columns]} if panel.other else {}
    return {
        "z": np.log2(panel.values, where=panel.values > 0, out=empty).astype(np.float32),
        "customdata": panel.values.astype(np.float32),
        "y": panel.layers,
        "text": panel.names,
        "hoverongaps": False,
        "hovertemplate": f"layer %{{y}}, {what}<br>%{{text}}<br>%{{customdata:.3f}} bpw"
        f"<extra>{words(panel.title)}</extra>",
        **columns,
        **_gaps(panel.values.shape),
    }


def _axes(figure: Any, panel: Panel, place: Mapping[str, int], *, labelled: bool) -> None:
    plain = {"showgrid": False, "zeroline": False}
    if panel.other:
        angle = 0 if max(map(len, panel.columns)) <= _SHORT else -90
        figure.update_xaxes(type="category", tickangle=angle, **plain, **place)
    else:
        figure.update_xaxes(title="expert", tickformat="d", **plain, **place)
    title = "layer" if place["col"] == 1 else None
    figure.update_yaxes(**_LAYERS | {"title": title, "showticklabels": labelled}, **place)


def _gaps(shape: tuple[int, ...]) -> dict[str, int]:
    """Return the space between cells: none if they are only a few pixels high or wide."""
    return {"xgap": int(shape[1] <= _BESIDE), "ygap": int(shape[0] <= _BESIDE)}
