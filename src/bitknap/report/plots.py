"""The plots of a report, drawn by plotly: frontier, prediction, refinement and prices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitknap.report.comparison_rows import GROUPS, OTHER, OURS, Row, at, budgets_of, number, rows_of

# Marker symbols, so that groups also differ without colour.
_SYMBOLS = {
    "ours": "circle",
    "uniform": "square",
    "published": "diamond",
    "estimator": "triangle-up",
    "search": "star",
    "signal": "triangle-down",
    "random": "x",
}
# Differs from the page's text colour, and is visible on light and dark backgrounds.
_THIN = {"color": OTHER, "width": 1}
# The frontier is drawn this many bits per weight beyond the measured sizes.
_BEYOND = 0.15


def words(text: object) -> str:
    """Escape a text for plotly, which interprets a few tags and entities."""
    return escape(str(text), quote=False)


def pareto(document: Mapping[str, Any]) -> Any:
    """Plot KL against bits per weight; None if nothing was measured."""
    from plotly import graph_objects as go

    measured = [row for row in rows_of(document) if placed(row)]
    if not measured:
        return None
    figure = go.Figure()
    sizes, costs = frontier_of(document, [float(row["bpw"]) for row in measured])
    if sizes:
        line = {**_THIN, "dash": "dot"}
        figure.add_scatter(x=sizes, y=costs, mode="lines", line=line, name="predicted")
        figure.data[-1].hovertemplate = "predicted %{y:.4g} at %{x:.3f} bpw<extra></extra>"
    for group in reversed(groups_of(measured)):
        rows = [row for row in measured if row.get("group") == group]
        line_of = best_line(document, group)
        if line_of:
            figure.add_scatter(
                x=[row["bpw"] for row in line_of],
                y=[row["kl"] for row in line_of],
                mode="lines",
                line={"color": _colour(group), "width": 2},
                hoverinfo="skip",
                legendgroup=group,
                showlegend=False,
            )
        figure.add_scatter(
            x=[row["bpw"] for row in rows],
            y=[row["kl"] for row in rows],
            text=[_said(row) for row in rows],
            hovertemplate="%{text}<br>KL %{y:.4g} at %{x:.3f} bpw<extra></extra>",
            legendgroup=group,
            name=words(group),
            **_marks(group, rows),
        )
    figure.update_xaxes(title="bits per weight, scales and zeros counted")
    figure.update_yaxes(title="KL to the original, nats/token")
    figure.update_yaxes(**_scale([float(row["kl"]) for row in measured]))
    return calm(_legend_above(figure))


def prediction(document: Mapping[str, Any]) -> Any:
    """Plot measured against predicted KL with the diagonal; None without predictions."""
    from plotly import graph_objects as go

    rows = [row for row in rows_of(document) if placed(row) and (number(row, "predicted") or 0) > 0]
    if not rows:
        return None
    ends = [float(row[key]) for row in rows for key in ("predicted", "kl")]
    low, high = min(ends) / 1.1, max(ends) * 1.1
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line=_THIN, name="equal", hoverinfo="skip"
    )
    for group in reversed(groups_of(rows)):
        some = [row for row in rows if row.get("group") == group]
        figure.add_scatter(
            x=[row["predicted"] for row in some],
            y=[row["kl"] for row in some],
            text=[f"{_said(row)}, {words(row.get('budget'))}" for row in some],
            hovertemplate="%{text}<br>predicted %{x:.4g}, measured %{y:.4g}<extra></extra>",
            name=words(group),
            **_marks(group, some),
        )
    figure.update_xaxes(title="predicted KL, nats/token", **_scale(ends))
    figure.update_yaxes(title="measured KL, nats/token", **_scale(ends))
    return calm(_legend_above(figure))


def refinement(steps: Sequence[Mapping[str, Any]]) -> Any:
    """Plot predicted and measured loss by step, accepted steps filled; None without steps."""
    from plotly import graph_objects as go

    known = [(index, step) for index, step in enumerate(steps) if step.get("loss") is not None]
    if not known:
        return None
    figure = go.Figure()
    figure.add_scatter(
        x=[index for index, step in known if step.get("predicted") is not None],
        y=[step["predicted"] for _, step in known if step.get("predicted") is not None],
        mode="lines",
        line={**_THIN, "dash": "dot"},
        name="predicted",
        hovertemplate="step %{x}: predicted %{y:.4g}<extra></extra>",
    )
    for name, accepted in (("measured", False), ("measured, accepted", True)):
        some = [(index, step) for index, step in known if bool(step.get("accepted")) == accepted]
        if not some:
            continue
        figure.add_scatter(
            x=[index for index, _ in some],
            y=[step["loss"] for _, step in some],
            text=[words(step.get("origin", "")) for _, step in some],
            mode="lines+markers" if accepted else "markers",
            line={"color": GROUPS[OURS], "width": 2, "shape": "hv"},
            marker={
                "color": GROUPS[OURS] if accepted else OTHER,
                "symbol": "circle" if accepted else "circle-open",
                "size": 7,
            },
            name=name,
            hovertemplate="step %{x}, %{text}: %{y:.4g}<extra></extra>",
        )
    figure.update_xaxes(title="step", tickformat="d")
    figure.update_yaxes(title="KL, nats/token", tickformat="~g")
    return calm(_legend_above(figure))


def prices(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a bar chart of the profiles' predicted costs; None if there are none."""
    from plotly import graph_objects as go

    some = [row for row in rows if row.get("cost") is not None]
    if not some:
        return None
    figure = go.Figure(
        go.Bar(
            x=[row["cost"] for row in some],
            y=[words(row.get("profile")) for row in some],
            text=[f"× {row['ratio']:.3g}" if row.get("ratio") is not None else "" for row in some],
            orientation="h",
            marker={"color": GROUPS[OURS]},
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="predicted cost, nats/token", tickformat="~g")
    # Leave room for the ratios beside the bars.
    figure.update_xaxes(range=[0, 1.2 * max(row["cost"] for row in some)])
    figure.update_yaxes(type="category", autorange="reversed", ticksuffix="  ", showgrid=False)
    figure.update_layout(bargap=0.4)
    return calm(figure)


def calm(figure: Any) -> Any:
    """Let a figure fill its place: margins as small as labels allow, and slightly smaller text."""
    figure.update_layout(margin={"l": 8, "r": 8, "b": 8}, font={"size": 12})
    figure.update_xaxes(automargin=True, title_standoff=8)
    figure.update_yaxes(title_standoff=8)
    return figure


def best_line(document: Mapping[str, Any], group: str) -> list[Row]:
    """Return Bitknap's, or the best uniform, row at every budget; none for other groups."""
    line = []
    for budget in budgets_of(document):
        rows = [row for row in at(document, budget) if row.get("group") == group and placed(row)]
        mine = [row for row in rows if row.get("strategy") == OURS] if group == OURS else rows
        if group in (OURS, "uniform") and mine:
            line.append(min(mine, key=lambda row: float(row["kl"])))
    return sorted(line, key=lambda row: float(row["bpw"]))


def frontier_of(
    document: Mapping[str, Any], sizes: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return bits per weight and cost of the predicted frontier near the measured sizes."""
    low, high = min(sizes) - _BEYOND, max(sizes) + _BEYOND
    points = sorted(
        (float(point["bits_per_weight"]), float(point["cost"]))
        for point in document.get("frontier") or ()
        if point.get("bits_per_weight") is not None and (point.get("cost") or 0) > 0
    )
    inside = [(size, cost) for size, cost in points if low <= size <= high]
    return [size for size, _ in inside], [cost for _, cost in inside]


def marked(values: Sequence[float]) -> tuple[int, ...]:
    """Return the leading digits at which a logarithmic axis of positive values has ticks.

    The result is empty if the values are so close that no tick might lie between them.
    """
    span = max(values) / min(values)
    return (1, 2, 5) if span >= 6 else (1, 2, 3, 5) if span >= 2.5 else ()


def _scale(values: Sequence[float]) -> dict[str, Any]:
    digits = marked(values)
    if not digits:
        return {"tickformat": "~g"}
    low, high = min(values) / 2, max(values) * 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    shown = [tick for tick in ticks if low <= tick <= high]
    return {"type": "log", "tickformat": "~g", "tickvals": shown}


def placed(row: Row) -> bool:
    """Return whether a row can be shown on logarithmic axes."""
    return number(row, "bpw") is not None and (number(row, "kl") or 0) > 0


def groups_of(rows: Sequence[Row]) -> list[str]:
    """Return the groups of the rows, known ones first."""
    return [
        *dict.fromkeys(
            [
                *(g for g in GROUPS if any(row.get("group") == g for row in rows)),
                *(str(row.get("group")) for row in rows),
            ]
        )
    ]


def _colour(group: str) -> str:
    return GROUPS.get(group, OTHER)


def _marks(group: str, rows: Sequence[Row]) -> dict[str, Any]:
    size, opacity = (10, 1.0) if group == OURS else (8, 0.85)
    symbol: Any = _SYMBOLS.get(group, "circle")
    if group == OURS:
        # Variants of Bitknap's plans, such as those before refinement, are hollow.
        symbol = [symbol + "-open" * (row.get("strategy") != OURS) for row in rows]
    return {
        "mode": "markers",
        "marker": {"color": _colour(group), "symbol": symbol, "size": size, "opacity": opacity},
    }


def _said(row: Row) -> str:
    setting = row.get("setting")
    return words(row.get("strategy")) + (f", {words(setting)}" if setting else "")


def _legend_above(figure: Any) -> Any:
    figure.update_layout(
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "reversed",
        }
    )
    return figure


def decades(values: Sequence[float]) -> tuple[list[float], list[str]]:
    """Return ticks of a colour bar for log10 of positive values, and their labels."""
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = [
        base * 10**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for base in ((1, 2, 5) if high - low < 2 else (1,))
    ]
    kept = [step for step in steps if low - 1e-9 <= math.log10(step) <= high + 1e-9]
    kept = kept or [max(values)]
    return [math.log10(step) for step in kept], [
        f"{step:,.0f}" if step >= 1 else f"{step:g}" for step in kept
    ]
