"""Plans, cost tables and losses as tables that the CLI prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bitknap.allocation import BitPlan, CostTable
from bitknap.allocation.problem.budget import human
from bitknap.allocation.problem.units import kinds
from bitknap.allocation.tradeoffs.frontier_path import Frontier
from bitknap.allocation.tradeoffs.profile_price import Price
from bitknap.report.table_facts import displayed

# Number of plans of a frontier that a table shows.
_SHOWN = 16


def bits_table(plan: BitPlan) -> Table:
    """Return average bits per weight by layer and projection, including metadata."""
    units = plan.units
    of_kinds = kinds(units)
    table = Table(title=f"bits per weight, {plan.bpw:.4g} on average")
    for head in ("layer", *of_kinds, "all", "bytes"):
        table.add_column(head, justify="right")
    for layer in np.unique(units.layer):
        here = units.layer == layer
        cells = [_bpw(plan, here & of_kind) for of_kind in of_kinds.values()]
        table.add_row(str(layer), *cells, _bpw(plan, here), f"{plan.nbytes[here].sum():,}")
    table.add_section()
    everything = np.ones(len(units), dtype=bool)
    cells = [_bpw(plan, of_kind) for of_kind in of_kinds.values()]
    table.add_row("all", *cells, _bpw(plan, everything), f"{plan.total_bytes:,}")
    return table


def widths_table(plan: BitPlan) -> Table:
    """Return how many units and weights each format has, and where groups do not divide rows.

    "short" counts the weights that last groups of rows lack to fill the group size: their scales
    are stored in full, but codes are never padded.
    """
    table = Table(title="formats")
    for head in ("format", "units", "weights", "bytes", "short"):
        table.add_column(head, justify="left" if head == "format" else "right")
    weights = plan.units.numel
    for index in np.unique(plan.choice):
        chosen = plan.choice == index
        share = 100 * weights[chosen].sum() / max(1, weights.sum())
        item = plan.formats[index]
        short = int((plan.units.rows * item.padding(plan.units.cols))[chosen].sum())
        size = f"{plan.nbytes[chosen].sum():,}"
        table.add_row(item.name, f"{chosen.sum():,}", f"{share:.1f} %", size, f"{short:,}")
    return table


def cost_table(table: CostTable) -> Table:
    """Return the cost of each format if every unit that allows it had it."""
    unit = table.provenance.get("unit", "nats/token")
    forbidden = (~np.isfinite(table.cost)).sum(0)
    which = "all that may" if forbidden.any() else "all"
    view = Table(title=f"{len(table.units):,} units: {unit} if {which} had one format")
    heads = ["format", "bpw", "bytes", "cost", *(["forbidden to"] if forbidden.any() else [])]
    for head in heads:
        view.add_column(head, justify="left" if head == "format" else "right")
    for index, item in enumerate(table.formats):
        size = int(table.nbytes[:, index].sum())
        bpw = f"{8 * size / table.weights:.3f}" if table.weights else "–"
        known = table.cost[np.isfinite(table.cost[:, index]), index].sum()
        row = [item.name, bpw, f"{size:,}", f"{known:.5g}", f"{forbidden[index]:,} units"]
        view.add_row(*row[: len(heads)])
    return view


def limits_table(limits: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return how much of each limit a plan uses.

    Args:
        limits: by name, "used", "bound" (None for no bound), and "rule", which is "at least" or
            "at most".
    """
    view = Table(title="limits")
    for head in ("limit", "used", "bound", "share"):
        view.add_column(head, justify="left" if head == "limit" else "right")
    for name, row in limits.items():
        used, bound = row["used"], row["bound"]
        share = f"{100 * used / bound:.1f} %" if bound else "–"
        shown = "–" if bound is None else f"{row['rule']} {bound:,.6g}"
        view.add_row(name, f"{used:,.6g}", shown, share)
    return view


def ledger_table(ledger: Mapping[str, int]) -> Table:
    """Return what a device holds, one entry a row, with its share of the device."""
    view = Table(title="memory of the device")
    for head in ("", "memory", "share"):
        view.add_column(head, justify="left" if not head else "right")
    size = ledger["device"]
    for name, count in ledger.items():
        if name in ("left", "left for units"):
            view.add_section()
        view.add_row(name, human(count), f"{100 * count / size:.1f} %")
    return view


def losses_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return perplexity, KL and agreement of named models, one per row."""
    table = Table(title="on held-out text")
    for head in ("", "bytes of units", "perplexity", "KL, nats/token", "same top token"):
        table.add_column(head, justify="left" if not head else "right")
    for name, row in rows.items():
        size = row.get("bytes")
        table.add_row(
            name,
            "" if size is None else f"{size:,}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
            f"{100 * row['top1']:.1f} %",
        )
    return table


def price_table(prices: Sequence[Price], chosen: str) -> Table:
    """Return the cost of each profile within the same limits, with the chosen one marked."""
    table = Table(title="price of a runtime's grouping rule, same limits")
    for head in ("profile", "cost", "over free", "gap", "bpw"):
        table.add_column(head, justify="left" if head == "profile" else "right")
    for one in prices:
        name = one.profile.name + (" *" if one.profile.name == chosen else "")
        if one.solution is None:
            # The reason names the smallest reachable value before the limit.
            why = one.reason.partition(", limit is")[0]
            table.add_row(name, f"infeasible: {why}", "–", "–", "–")
            continue
        ratio = "–" if one.ratio is None else f"{one.ratio:.4g} x"
        bpw = one.solution.plan.totals["bits_per_weight"]
        size = "–" if bpw is None else f"{bpw:.4g}"
        table.add_row(name, f"{one.cost:.5g}", ratio, f"{one.solution.gap:.2g}", size)
    return table


def frontier_table(frontier: Frontier) -> Table:
    """Return some plans of a frontier, evenly spaced in bytes."""
    unit = frontier.header.get("unit", "nats/token")
    table = Table(title=f"{len(frontier.cost):,} plans, each optimal at its bytes")
    for head in ("bpw", "bytes", f"cost, {unit}"):
        table.add_column(head, justify="right")
    for point in frontier.points(_SHOWN):
        bpw = "–" if point.bits_per_weight is None else f"{point.bits_per_weight:.3f}"
        table.add_row(bpw, f"{point.nbytes:,}", f"{point.cost:.5g}")
    return table


def frontier_summary(frontier: Frontier) -> dict[str, Any]:
    """Return a summary of a frontier as JSON values."""
    return {
        "kind": "frontier",
        "units": len(frontier.units),
        "weights": frontier.weights,
        "plans": len(frontier.cost),
        "formats": [item.name for item in frontier.formats],
        "header": displayed(frontier.header),
        "points": [
            {"bits_per_weight": point.bits_per_weight, "bytes": point.nbytes, "cost": point.cost}
            for point in frontier.points(_SHOWN)
        ],
    }


def uniform_costs(table: CostTable) -> dict[str, tuple[int, float]]:
    """Return bytes and cost of every format that all units may have."""
    sizes, costs = table.nbytes.sum(0).tolist(), table.cost.sum(0).tolist()
    return {
        item.name: (size, cost)
        for item, size, cost in zip(table.formats, sizes, costs, strict=True)
        if np.isfinite(cost)
    }


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """Return names and values, one per row."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _said(name, value))
    return table


def forecast_table(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> Table:
    """Return the parts of the main job in each residency, one part a row.

    Args:
        rows: from `api.forecasts.forecasting`.
        machine: rates of the machine.
    """
    which = "measured here" if machine["probed"] else "typical"
    table = Table(title=f"forecast of the main job on {machine['cores']} cores, rates {which}")
    heads = ["part", "model in memory", "memory", "time"]
    limited = machine["memory"] is not None
    for head in [*heads, *([f"in {human(machine['memory'])}"] if limited else [])]:
        table.add_column(head, justify="left" if head in heads[:2] else "right")
    previous = None
    for row in rows:
        if previous not in (None, row["residency"]):
            table.add_section()
        previous = row["residency"]
        cells = [row["step"], row["residency"], human(row["memory_bytes"]), _time(row["seconds"])]
        table.add_row(*cells, *(["fits" if row["fits"] else "does not"] if limited else []))
    return table


def steps_table(steps: Sequence[Mapping[str, Any]], cores: int) -> Table:
    """Return the resources of each step of the work, one per row."""
    table = Table(title=f"what each step takes at least, about, on {cores} cores")
    for head in ("step", "memory", "time"):
        table.add_column(head, justify="left" if head == "step" else "right")
    for step in steps:
        table.add_row(step["name"], human(step["memory_bytes"]), _time(step["seconds"]))
    return table


def exports_table(exports: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return which runtimes could hold the model, one per row, and what prevents the others."""
    table = Table(title="what other runtimes allow, and the time to plan and write for them")
    for head in ("export to", "", "bits", "group sizes", "profile", "estimate", "write", "why"):
        table.add_column(head, no_wrap=head == "export to")
    for name, fit in exports.items():
        bits = ", ".join(map(str, fit["bits"]))
        groups = ", ".join(map(str, fit["groups"])) or "–"
        possible = "yes" if fit["possible"] else "no"
        times = [fit[f"{part}_seconds"] for part in ("estimate", "write")]
        spent = ["–" if seconds is None else _time(seconds) for seconds in times]
        table.add_row(name, possible, bits, groups, fit["profile"], *spent, fit["reason"])
    return table


def _time(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def plan_summary(plan: BitPlan) -> dict[str, Any]:
    """Return a summary of a plan as JSON values: totals, header, bits by layer and projection."""
    units, of_kinds = plan.units, kinds(plan.units)
    by_layer = {
        str(layer): {
            kind: _number(plan, of_kind & (units.layer == layer))
            for kind, of_kind in of_kinds.items()
        }
        for layer in np.unique(units.layer)
    }
    return {
        "kind": "plan",
        "model": plan.model,
        "totals": plan.totals,
        "header": displayed(plan.header),
        "formats": {
            plan.formats[i].name: int((plan.choice == i).sum()) for i in np.unique(plan.choice)
        },
        "bits_per_weight": by_layer,
    }


def _number(plan: BitPlan, mask: np.ndarray) -> float | None:
    weights = int(plan.units.numel[mask].sum())
    return round(8 * int(plan.nbytes[mask].sum()) / weights, 6) if weights else None


def _bpw(plan: BitPlan, mask: np.ndarray) -> str:
    number = _number(plan, mask)
    return "–" if number is None else f"{number:.3f}"


def _said(name: str, value: Any) -> str:
    if isinstance(value, int) and ("bytes" in name or "size" in name):
        return f"{human(value)} ({value:,})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
