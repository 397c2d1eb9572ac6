"""Differences between two plans, as tables and as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from bitknap.allocation import BitPlan
from bitknap.allocation.plans.plan_diff import Moved, PlanDiff

# Number of changed units that are listed.
_SHOWN = 20
# Maximum number of formats shown as a matrix; more are listed, since terminals are too narrow.
_WIDE = 8


def diff_tables(diff: PlanDiff, before: str, after: str) -> list[Table]:
    """Return totals, changes by layer and projection, by format, and the largest changes.

    Args:
        diff: the differences between two plans.
        before: name of the first plan.
        after: name of the second plan.
    """
    tables = [_totals(diff, before, after)]
    if diff.changed.any():
        tables += [_moved(diff), _transitions(diff), _largest(diff)]
    return tables


def diff_summary(diff: PlanDiff) -> dict[str, Any]:
    """Return the differences as JSON values: all formats and groups, and the largest units."""
    rows, columns, counts = diff.transitions()
    everything = np.ones(len(diff.units), dtype=bool)
    whole = asdict(diff.moved(everything))
    return {
        "kind": "plan diff",
        "model": diff.before.model or diff.after.model,
        "before": _total(diff.before),
        "after": _total(diff.after),
        "units": {key: whole[key] for key in ("up", "down", "other", "same")},
        "groups": [asdict(group) for group in diff.groups()],
        "formats": {
            name: {to: n for to, n in zip(columns, row, strict=True) if n}
            for name, row in zip(rows, counts.tolist(), strict=True)
        },
        "largest": [
            diff.units.row(unit)._asdict()
            | {
                "before": diff.before.format_of(unit).name,
                "after": diff.after.format_of(unit).name,
                "bytes": int(diff.delta[unit]),
            }
            for unit in diff.largest(_SHOWN).tolist()
        ],
    }


def _total(plan: BitPlan) -> dict[str, Any]:
    return plan.totals | {
        "objective": plan.header.get("objective"),
        "estimator": plan.header.get("estimator"),
    }


def _totals(diff: PlanDiff, before: str, after: str) -> Table:
    first, second = _total(diff.before), _total(diff.after)
    counts = diff.moved(np.ones(len(diff.units), dtype=bool))
    some = counts.up + counts.down + counts.other
    said = f"{some:,} of {len(diff.units):,} units differ" if some else "no unit differs"
    table = Table(title=said)
    table.add_column("")
    for head in (escape(before), escape(after), "change"):
        table.add_column(head, justify="right", overflow="fold")
    # Costs of different estimators have different scales.
    alike = first["estimator"] == second["estimator"]
    for name, key, form in (
        ("bytes", "bytes", ",d"),
        ("bits per weight", "bits_per_weight", ".4f"),
        ("predicted cost", "objective", ".5g"),
    ):
        values = [first[key], second[key]]
        change = "–"
        if None not in values and (alike or key != "objective"):
            change = f"{values[1] - values[0]:+{form}}"
            if values[0]:
                change += f" ({100 * (values[1] / values[0] - 1):+.2f} %)"
        table.add_row(name, *("–" if v is None else f"{v:{form}}" for v in values), change)
    return table


def _moved(diff: PlanDiff) -> Table:
    groups = [group for group in diff.groups() if group.up + group.down + group.other]
    table = Table(title="units that changed, by layer and projection")
    for head in ("layer", "projection", "up", "down", "as large", "same", "bytes"):
        table.add_column(head, justify="left" if head == "projection" else "right")
    for group in groups:
        table.add_row(str(group.layer), group.kind, *_counts(group))
    table.add_section()
    whole = diff.moved(np.ones(len(diff.units), dtype=bool))
    table.add_row("all", "", *_counts(whole))
    return table


def _counts(group: Moved) -> list[str]:
    numbers = (group.up, group.down, group.other, group.same)
    return [*(f"{number:,}" for number in numbers), f"{group.nbytes:+,}"]


def _transitions(diff: PlanDiff) -> Table:
    rows, columns, counts = diff.transitions()
    if len(columns) > _WIDE:
        table = Table(title="changes of format")
        for head in ("before", "after", "units"):
            table.add_column(head, justify="right" if head == "units" else "left")
        moved = [(-n, r, c) for (r, c), n in np.ndenumerate(counts) if n and rows[r] != columns[c]]
        for number, row, column in sorted(moved)[:_SHOWN]:
            table.add_row(rows[row], columns[column], f"{-number:,}")
        return table
    table = Table(title="units by format: before down, after across")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, row in zip(rows, counts.tolist(), strict=True):
        table.add_row(name, *(f"{number:,}" if number else "·" for number in row))
    return table


def _largest(diff: PlanDiff) -> Table:
    units = diff.largest(_SHOWN).tolist()
    table = Table(title=f"the {len(units)} largest changes")
    for head in ("unit", "before", "after", "bytes"):
        table.add_column(head, justify="right" if head == "bytes" else "left")
    for unit in units:
        names = (plan.format_of(unit).name for plan in (diff.before, diff.after))
        table.add_row(diff.units.label(unit), *names, f"{diff.delta[unit]:+,}")
    return table
