"""The pictures beside a report's page, for papers and READMEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitknap.errors import InputError
from bitknap.report.comparison_rows import GROUPS, OTHER, OURS, Row, rows_of
from bitknap.report.figure_files import GRID, INK
from bitknap.report.plots import best_line, frontier_of, groups_of, marked, placed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The markers of the page, by their matplotlib names.
_MARKERS = {
    "ours": "o",
    "uniform": "s",
    "published": "D",
    "estimator": "^",
    "search": "*",
    "signal": "v",
    "random": "x",
}


def pareto_figure(document: Mapping[str, Any]) -> Figure:
    """Draw KL against bits per weight, with a marker for each strategy and budget.

    Lines join Bitknap's plans and the best uniform recipes; the predicted frontier is dotted. Write
    it with `bitknap.report.figure_files.write_picture`.

    Raises:
        InputError: no row of the document was measured.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(document) if placed(row)]
    if not rows:
        raise InputError("picture: no row has a KL above 0 and bits per weight; nothing to draw")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    # Bitknap's plans are drawn last and named first.
    for group in reversed(groups_of(rows)):
        colour, some = GROUPS.get(group, OTHER), [row for row in rows if row.get("group") == group]
        axes.plot(*_places(best_line(document, group)), color=colour, lw=2)
        first = [row for row in some if row.get("strategy") == OURS] if group == OURS else some
        rest = [row for row in some if row not in first]
        style: dict[str, Any] = {"marker": _MARKERS.get(group, "o"), "color": colour}
        style |= {"linestyle": "none", "markersize": 7 if group == OURS else 5}
        axes.plot(*_places(first), label=_plain(group), **style)
        # Variants of Bitknap's plans, such as those before refinement, are hollow.
        axes.plot(*_places(rest), markerfacecolor="none", **style)
    sizes, costs = frontier_of(document, [float(row["bpw"]) for row in rows])
    if sizes:
        axes.plot(sizes, costs, ":", color=OTHER, linewidth=1, label="predicted")
    _label(axes, [float(row["kl"]) for row in rows], (document.get("about") or {}).get("model"))
    handles, labels = axes.get_legend_handles_labels()
    named = len(groups_of(rows))
    axes.legend(
        [*reversed(handles[:named]), *handles[named:]],
        [*reversed(labels[:named]), *labels[named:]],
        frameon=False,
    )
    return figure


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["bpw"] for row in rows], [row["kl"] for row in rows]


def _label(axes: Any, costs: Sequence[float], model: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if steps := marked(costs):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per weight, scales and zeros counted")
    axes.set_ylabel("KL to the original, nats/token")
    title = "Size against loss" + (f": {model}" if model else "")
    axes.set_title(_plain(title), loc="left", color=INK)
    axes.grid(True, which="major", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    """Escape a text for matplotlib, which reads dollar signs as mathematics."""
    return text.replace("$", r"\$")
