"""A compare or quantize run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitknap.allocation import BitPlan
from bitknap.allocation.problem.budget import human
from bitknap.report.comparison_rows import budgets_of
from bitknap.report.html import drawn, folded, section, shell, table
from bitknap.report.maps import bits_range, coverage_figure, plan_figure
from bitknap.report.plots import pareto, prediction, prices, refinement
from bitknap.report.strategy_table import SCRIPT, STYLE, strategy_tables
from bitknap.report.summary import facts, sentences, verdict_table

# Maps taller than this many pixels are folded away, except for the first plan's.
_TALL = 400
_STYLE = """
ul { padding-left: 1.2rem }
li { margin: .3rem 0 }
.facts td:first-child { color: var(--soft); white-space: nowrap }
.claims table { min-width: 44rem }
.price td:last-child { min-width: 12rem }
.verdict td { white-space: nowrap }
.grid { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)) }
.grid > div { min-width: 0 }
"""


def report(document: Mapping[str, Any], plans: Mapping[str, BitPlan]) -> str:
    """Return the page of a run.

    Args:
        document: content of compare.json, plain JSON values; a part that is missing or empty is
            left out of the page.
        plans: plans to draw, by the name of their budget, in this order.

    Returns:
        HTML that loads nothing from elsewhere; equal inputs give equal bytes.

    Raises:
        InputError: plotly is not installed.
    """
    about = document.get("about") or {}
    budgets = budgets_of(document)
    body = [
        _summary(document),
        _strategies(document, budgets),
        _figure(
            "Size against loss",
            "Lower and further left is better. Lines join Bitknap's plans (ours) and the best "
            "uniform recipes; the dotted line is what the calibrated table predicts; hollow "
            "marks are variants of Bitknap's plans.",
            pareto(document),
            480,
        ),
        _figure(
            "Predicted and measured",
            "Predicted is what the calibrated table says; plans below the line lost less.",
            prediction(document),
            480,
        ),
        _plans(plans),
        _device(document.get("device") or {}),
        _coverage(document.get("coverage") or {}),
        _prices(document.get("price") or ()),
        _refinements(document.get("refine") or {}),
        _claims(document.get("claims") or ()),
        _run(document),
    ]
    title = f"Bits of {about['model']}" if about.get("model") else "Bitknap report"
    return shell(title, body, style=STYLE + _STYLE, script=SCRIPT)


def _summary(document: Mapping[str, Any]) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in sentences(document))
    parts = [f"<ul>{said}</ul>" if said else ""]
    head, rows = verdict_table(document)
    if rows:
        parts.append(f'<div class="wide verdict">{table(rows, head, numbers=range(3, 7))}</div>')
    return section("Summary", "", *parts) if any(parts) else ""


def _strategies(document: Mapping[str, Any], budgets: Sequence[str]) -> str:
    tables = strategy_tables(document, budgets)
    note = (
        "All at equal bytes, metadata counted. The strategy named ours is Bitknap's plan. KL is "
        "to the original, in nats per token; ± is one standard error. The difference is the KL "
        "of a strategy minus that of ours at the strategy's bytes, paired over the same text; up "
        "to two standard errors it is not significant. Click a column's head to sort."
    )
    return section("Strategies", note, tables) if tables else ""


def _figure(heading: str, note: str, figure: Any | None, height: int) -> str:
    return "" if figure is None else section(heading, note, drawn(figure, heading, height))


def _plans(plans: Mapping[str, BitPlan]) -> str:
    low, high = bits_range([*plans.values()])
    parts: list[str] = []
    for index, (budget, plan) in enumerate(plans.items()):
        drawing = plan_figure(plan, low, high)
        if drawing is not None:
            plot = drawn(drawing[0], f"plan {index}", drawing[1])
            opened = not parts or drawing[1] <= _TALL
            parts.append(folded(budget, f"{plan.bpw:.4g} bits per weight", plot, opened=opened))
    note = (
        "Bits per weight of every unit, scales and zero points counted: layers down, experts "
        "across. All plans have the same colour scale."
    )
    return section("Plan", note, *parts) if parts else ""


def _device(ledger: Mapping[str, int]) -> str:
    if not ledger:
        return ""
    size = ledger["device"]
    rows = [[name, human(count), f"{100 * count / size:.1f} %"] for name, count in ledger.items()]
    view = table(rows, ["", "memory", "share"], numbers=(1, 2))
    note = "What the device holds while it generates; all but the weights is a forecast."
    return section("Memory of the device", note, view)


def _coverage(coverage: Mapping[str, Any]) -> str:
    drawing = coverage_figure(coverage)
    if drawing is None:
        return ""
    figure, height, unseen = drawing
    none = "every expert saw some" if not unseen else f"{unseen:,} saw none (crosses)"
    note = f"Calibration tokens routed to each expert; {none}."
    return section("Expert coverage", note, drawn(figure, "coverage", height))


def _prices(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [
        [
            str(row.get("profile")),
            _short(row.get("cost"), ".4g"),
            _short(row.get("ratio"), ".3f"),
            _short(row.get("bits_per_weight"), ".3f"),
            str(row.get("reason") or ""),
        ]
        for row in rows
    ]
    head = ["profile", "predicted cost", "ratio to free", "bpw", "reason"]
    columns = 5 if any(row[4] for row in cells) else 4
    view = table([row[:columns] for row in cells], head[:columns], numbers=(1, 2, 3))
    figure = prices(rows)
    bars = "" if figure is None else drawn(figure, "price", 90 + 36 * len(rows))
    note = "What the grouping rules of runtimes cost, within the same limits."
    return section("Price of runtime profiles", note, f'<div class="wide price">{view}</div>', bars)


def _refinements(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for index, (budget, steps) in enumerate(runs.items()):
        figure = refinement(steps)
        if figure is not None:
            plot = drawn(figure, f"refine {index}", 320)
            parts.append(f"<div><h3>{escape(budget)}: {_taken(steps)}</h3>{plot}</div>")
    note = (
        "KL of the measured plans on calibration text, one plan per step. Filled marks are plans "
        "that a paired test supports; they were accepted."
    )
    grid = f'<div class="grid">{"".join(parts)}</div>'
    return section("Refinement", note, grid) if parts else ""


def _taken(steps: Sequence[Mapping[str, Any]]) -> str:
    accepted = [step["loss"] for step in steps if step.get("accepted") and step.get("loss")]
    said = f"{len(steps)} measured, {len(accepted)} accepted"
    if len(accepted) > 1:
        said += f", KL {100 * (accepted[-1] / accepted[0] - 1):+.1f} %".replace("-", "−")
    return escape(said)


def _claims(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = ("claim", "source", "verdict", "figures")
    cells = [[str(row.get(key) or "–") for key in keys] for row in rows]
    note = "Claims of the papers that Bitknap builds on, measured again on this model."
    return (
        section("Claims", note, f'<div class="wide claims">{table(cells, keys)}</div>')
        if rows
        else ""
    )


def _run(document: Mapping[str, Any]) -> str:
    known, command = facts(document), (document.get("about") or {}).get("command")
    parts = [section("The run", "", f'<div class="facts">{table(known)}</div>')] if known else []
    if command:
        parts.append(section("Repeat it", "", f"<pre>{escape(str(command))}</pre>"))
    return "\n".join(parts)


def _short(value: Any, how: str) -> str:
    return "–" if value is None else format(value, how)
