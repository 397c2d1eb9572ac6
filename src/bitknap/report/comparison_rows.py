"""The rows of a comparison: their order, the best of each group, and significance.

A document is the content of compare.json, which `bitknap compare` writes: plain JSON values, of
which any part may be missing.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitknap.report.figure_files import DOTS, LINE

Row = Mapping[str, Any]

OURS, UNREFINED = "ours", "ours, unrefined"
# Two values differ significantly if they are more than this many standard errors apart.
ERRORS = 2.0
# Colours of the groups (Okabe and Ito's palette, safe for colour-blind readers), most important
# first.
GROUPS = {
    "ours": LINE,
    "uniform": DOTS,
    "published": "#CC79A7",
    "estimator": "#56B4E9",
    "search": "#E69F00",
    "signal": "#009E73",
    "random": "#8C959F",
}
# Colour of unknown groups and of lines without a group.
OTHER = "#8C959F"
_COLUMNS = (
    *("budget", "strategy", "group", "source", "status", "reason", "setting", "bytes", "bpw"),
    *("kl", "kl_se", "perplexity", "top1", "difference", "difference_se", "ratio", "rank"),
    *("measurements", "predicted"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Comparison of one row with Bitknap's row at the same bytes.

    Attributes:
        budget: name of the budget in the document.
        role: role of the row, such as "best uniform".
        row: the other strategy's row.
        ours: Bitknap's row at that budget, or None.
        word: result of `standing`.
    """

    budget: str
    role: str
    row: Row
    ours: Row | None
    word: str


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """Return all rows; an empty list if there are none."""
    return list(document.get("rows") or ())


def budgets_of(document: Mapping[str, Any]) -> list[str]:
    """Return the names of the budgets: those listed first, then those that only rows have."""
    listed = [str(entry["budget"]) for entry in document.get("budgets") or ()]
    return [*dict.fromkeys([*listed, *(str(row.get("budget")) for row in rows_of(document))])]


def at(document: Mapping[str, Any], budget: str) -> list[Row]:
    """Return the rows of a budget: Bitknap's, its variants, others by KL, those without a KL."""

    def key(row: Row) -> tuple[bool, bool, bool, float, str]:
        kl, name = number(row, "kl"), str(row.get("strategy"))
        return (
            name != OURS,
            row.get("group") != OURS,
            kl is None,
            math.inf if kl is None else kl,
            name,
        )

    return sorted((row for row in rows_of(document) if str(row.get("budget")) == budget), key=key)


def number(row: Row, key: str) -> float | None:
    """Return a finite number of a row that was measured, or None."""
    value = row.get(key)
    if row.get("status", "ok") != "ok" or isinstance(value, bool):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def standing(row: Row) -> str:
    """Compare a row's KL with Bitknap's: "higher", "lower", "alike", or "" if unknown."""
    difference, error = number(row, "difference"), number(row, "difference_se")
    if difference is None or error is None:
        return ""
    if abs(difference) <= ERRORS * error:
        return "alike"
    return "higher" if difference > 0 else "lower"


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    """Compare the best uniform, published and other strategy with Bitknap's at every budget."""
    result = []
    for budget in budgets_of(document):
        rows = at(document, budget)
        ours = next((row for row in rows if row.get("strategy") == OURS), None)
        others = [row for row in rows if row.get("group") != OURS]
        groups = {
            "best uniform": [row for row in others if row.get("group") == "uniform"],
            "best published": [row for row in others if row.get("group") == "published"],
            "best of the others": [
                row for row in others if row.get("group") not in ("uniform", "published")
            ],
        }
        for role, candidates in groups.items():
            row = _lowest(candidates)
            if row is not None:
                word = standing(row)
                result.append(Verdict(budget=budget, role=role, row=row, ours=ours, word=word))
    return result


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the positive numbers among `values`; None if there are none."""
    logs = [math.log(value) for value in values if value is not None and value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def rows_csv(document: Mapping[str, Any]) -> str:
    """Return all rows as CSV with a header line; the KL of each domain is a column "kl_NAME".

    Numbers are written in full, missing ones are empty. Equal documents give equal texts.
    """
    rows = rows_of(document)
    listed = (document.get("about") or {}).get("domains") or ()
    seen = (name for row in rows for name in row.get("domain_kl") or ())
    domains = [*dict.fromkeys([*map(str, listed), *map(str, seen)])]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"kl_{name}" for name in domains)])
    for budget in budgets_of(document):
        for row in at(document, budget):
            by_domain = row.get("domain_kl") or {}
            cells: Sequence[Any] = [
                *(row.get(name) for name in _COLUMNS),
                *(by_domain.get(name) for name in domains),
            ]
            writer.writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue()


def _lowest(rows: Sequence[Row]) -> Row | None:
    """Return the row of lowest KL, the first by name if equal; None if no row has a KL."""
    best: tuple[float, str, Row] | None = None
    for row in rows:
        kl = number(row, "kl")
        if kl is not None and (best is None or (kl, str(row.get("strategy"))) < best[:2]):
            best = kl, str(row.get("strategy")), row
    return None if best is None else best[2]
