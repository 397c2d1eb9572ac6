"""KL against bits per weight for every strategy, one panel per model and method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that colour-blind readers can distinguish (Okabe and Ito), in drawing order.
_COLOURS = {
    "random": "#BBBBBB",
    "signal": "#56B4E9",
    "estimator": "#009E73",
    "search": "#CC79A7",
    "published": "#E69F00",
    "uniform": "#D55E00",
    "ours": "#0072B2",
}
_LINES = ("uniform", "ours")
_GRID, _INK = "#DDDDDD", "#222222"


def picture(documents: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw documents, given by model and method, then by profile; only free choice is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(documents), 4.6), layout="constrained")
    axes = figure.subplots(1, len(documents), sharey=True, squeeze=False)[0]
    for place, (name, profiles) in zip(axes, documents.items(), strict=True):
        rows = [row for row in profiles["free"]["rows"] if row["status"] == "ok"]
        for group, colour in _COLOURS.items():
            here = [row for row in rows if row["group"] == group]
            _draw(place, here, group, colour)
        place.set_yscale("log")
        place.set_title(name.replace(".", ", "), loc="left", color=_INK)
        place.set_xlabel("bits per weight, scales and zeros counted")
        place.grid(True, color=_GRID, linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL on unseen text, nats per token")
    known: dict[str, Any] = {}
    for place in axes:
        known |= dict(zip(*place.get_legend_handles_labels()[::-1], strict=True))
    names = [group for group in reversed(_COLOURS) if group in known]
    handles = [known[name] for name in names]
    figure.legend(handles, names, frameon=False, loc="outside right center")
    return figure


def _draw(axes: Any, rows: list[Mapping[str, Any]], group: str, colour: str) -> None:
    line = [row for row in rows if row["strategy"] == group] if group in _LINES else []
    rest = [row for row in rows if row not in line]
    size, alpha = (14, 0.6) if group not in _LINES else (10, 0.5)
    label = None if line else group
    if rest:
        axes.scatter(
            [row["bpw"] for row in rest],
            [row["kl"] for row in rest],
            s=size,
            color=colour,
            alpha=alpha,
            linewidths=0,
            label=label,
        )
    if line:
        line.sort(key=lambda row: float(row["bpw"]))
        axes.plot(
            [row["bpw"] for row in line],
            [row["kl"] for row in line],
            "o-",
            color=colour,
            markersize=5,
            linewidth=2,
            label=group,
        )
