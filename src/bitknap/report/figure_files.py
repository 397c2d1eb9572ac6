"""Pictures of results: figures without a window; equal inputs give equal bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitknap.allocation.tradeoffs.frontier_path import Frontier
from bitknap.disk.atomic import write_whole
from bitknap.disk.manifest import GENERATOR
from bitknap.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Points of the curve: more than a screen can show.
_POINTS = 1000
# Costs smaller than the largest by this factor do not matter and only stretch the axis.
_SPAN = 1e5
# Dark blue and orange are safe for colour-blind readers (Okabe and Ito's palette).
LINE, DOTS, INK, GRID = "#0072B2", "#D55E00", "#222222", "#DDDDDD"
# Places of a label, in points from its dot: below the curve first, which is usually free.
_PLACES = ((-6, -3, "right", "top"), (7, 3, "left", "bottom"))


def frontier_figure(frontier: Frontier, uniform: Mapping[str, tuple[int, float]]) -> Figure:
    """Draw the cost of every budget's plan, and of uniform plans.

    Args:
        frontier: the curve.
        uniform: bytes and cost of uniform plans, by name of format.
    """
    from matplotlib.figure import Figure

    points = frontier.points(_POINTS)
    weights = frontier.weights if frontier.units.has_shapes else 0
    scale = 8 / weights if weights else 1.0
    costs = np.array([point.cost for point in points])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    sizes = np.array([point.nbytes for point in points]) * scale
    axes.plot(sizes, costs, color=LINE, linewidth=2, label="frontier: best plan at each size")
    named = {name: (x * scale, y) for name, (x, y) in _best(frontier, uniform).items()}
    if uniform:
        x, y = np.array([*uniform.values()]).T
        axes.plot(x * scale, y, "o", color=DOTS, markersize=3.5, alpha=0.55, markeredgewidth=0)
        x, y = np.array([*named.values()]).T
        axes.plot(x, y, "o", color=DOTS, markersize=6, label="all units in one format")
    _scale_costs(axes, [*costs, *(cost for _, cost in uniform.values())])
    axes.set_xlabel(
        "bits per weight, scales and zeros counted" if weights else "bytes of the units"
    )
    axes.set_ylabel(f"cost, {frontier.header.get('unit', 'nats/token')}")
    axes.set_title(_title(frontier), loc="left", color=INK)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    axes.margins(x=0.04)
    _label(figure, axes, named)
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as .svg or .png, whole or not at all; equal figures give equal bytes.

    Raises:
        InputError: the path has another suffix.
    """
    from matplotlib import rc_context

    # Random ids, the date and the version would differ between runs.
    silent = {
        ".svg": {"Date": None, "Creator": GENERATOR},
        ".png": {"Software": GENERATOR},
    }
    if path.suffix not in silent:
        raise InputError(f"picture {path}: name it .svg or .png")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "bitknap"}):
        figure.savefig(buffer, format=path.suffix[1:], metadata=silent[path.suffix], dpi=120)
    write_whole(path, buffer.getvalue())


def _scale_costs(axes: Any, costs: Sequence[float]) -> None:
    """Make the axis logarithmic over costs above 0; plans that cost nothing are not shown."""
    positive = [cost for cost in costs if cost > 0]
    if not positive:
        return
    axes.set_yscale("log")
    low, high = max(min(positive), max(positive) / _SPAN), max(positive)
    margin = max(high / low, 1.1) ** 0.05
    axes.set_ylim(low / margin, high * margin)


def _title(frontier: Frontier) -> str:
    profile = frontier.header.get("profile")
    under = f", profile {profile}" if profile else ""
    return f"Cost against size: {len(frontier.units):,} units{under}"


def _best(
    frontier: Frontier, uniform: Mapping[str, tuple[int, float]]
) -> dict[str, tuple[int, float]]:
    """Return the format of each width that is nearest to the frontier; only these get labels."""
    best: dict[str, tuple[float, str]] = {}
    for name, (size, cost) in uniform.items():
        bound = frontier.bound_at(size)
        distance = cost / bound if bound > 0 else cost - bound
        width = name.partition("-")[0] if name.startswith("int") else name
        best[width] = min(best.get(width, (np.inf, name)), (max(distance, 1.0), name))
    return {name: uniform[name] for _, name in best.values()}


def _label(figure: Figure, axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points, where they cover neither another name nor the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    inside = axes.get_window_extent(renderer)
    taken: list[Any] = [axes.get_legend().get_window_extent(renderer)]
    for name, point in points.items():
        for right, up, horizontal, vertical in _PLACES:
            text = axes.annotate(
                name,
                point,
                xytext=(right, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                color=INK,
            )
            box = text.get_window_extent(renderer)
            if _free(box, taken) and inside.contains(box.x0, box.y0):
                taken.append(box)
                break
            text.remove()


def _free(box: Any, taken: Sequence[Any]) -> bool:
    return not any(box.overlaps(other) for other in taken)
