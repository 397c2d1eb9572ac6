"""Tables of strategies in a report: one per budget, sortable, with reasons for missing values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitknap.report.comparison_rows import OURS, Row, at, number, standing
from bitknap.report.html import folded

# Name of each column, its sort key, and its meaning.
_COLUMNS = (
    ("strategy", "strategy", '"ours" is Bitknap\'s plan and comes first, the others by KL'),
    ("group", "group", ""),
    ("source", "source", "where the rule is from"),
    ("bytes", "bytes", "of all units, scales and zeros counted"),
    ("bpw", "bpw", "bits per weight, scales and zeros counted"),
    ("KL", "kl", "to the original, nats per token, ± one standard error"),
    ("perplexity", "perplexity", ""),
    ("top-1", "top1", "tokens whose likeliest successor stays the same"),
    (
        "difference",
        "difference",
        "of KL, that of the strategy minus that of ours at the strategy's bytes, paired, ± one "
        "standard error",
    ),
    ("ratio", "ratio", "of KL, that of the strategy over that of ours at the strategy's bytes"),
    ("rank", "rank", "by KL, mean over domains; 1 is best"),
    ("measured", "measurements", "measurements that the strategy needed"),
)
_TEXTS = 3  # columns of text; the others are numbers
_NOT = {"unreachable": "not reachable", "failed": "failed"}
STYLE = """
.sorted { font-size: .85rem; width: 100% }
.sorted th { padding-top: .4rem; white-space: nowrap; vertical-align: bottom }
.sorted td { white-space: nowrap; overflow-wrap: normal }
.sorted td:first-child { white-space: normal; min-width: 10rem }
.sorted td:first-child, .sorted th:first-child { position: sticky; left: 0;
  background: var(--paper) }
.sorted td.why { white-space: normal; min-width: 16rem }
.sorted small { display: block; font-size: .75rem }
.sorted button { all: unset; cursor: pointer; font-weight: 600 }
.sorted button:hover, .sorted button:focus-visible { text-decoration: underline }
.sorted [aria-sort=ascending] button::after { content: " ↑" }
.sorted [aria-sort=descending] button::after { content: " ↓" }
.sorted .ours td, .sorted .ours td:first-child { background: var(--lift) }
.why { color: var(--soft) }
"""
# Rows without a value stay at the bottom in either sort order.
SCRIPT = """
for (const table of document.querySelectorAll(".sorted")) {
  const heads = [...table.querySelectorAll("th")];
  const body = table.tBodies[0];
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[index] ? row.cells[index].dataset.v ?? "" : "";
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = head.dataset.text ? (x < y ? -1 : x > y) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
"""


def strategy_tables(document: Mapping[str, Any], budgets: Sequence[str]) -> str:
    """Return a table for every budget that has rows, with the first one open; "" without rows."""
    tables: list[str] = []
    for budget in budgets:
        rows = at(document, budget)
        if rows:
            inside = f'<div class="wide">{_table(rows)}</div>'
            tables.append(folded(budget, _counted(rows), inside, opened=not tables))
    return "\n".join(tables)


def plus_minus(value: float | None, error: float | None, *, sign: bool = False) -> str:
    """Return a value, rounded to the digits that its standard error supports, and the error."""
    if value is None:
        return "–"
    lead = "+" if sign and value > 0 else "−" if value < 0 else ""
    if error is None or error <= 0:
        return f"{lead}{abs(value):.4g}"
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{lead}{abs(value):.{digits}f} ± {error:.{digits}f}"


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(
        _head(name, note, text=index < _TEXTS) for index, (name, _, note) in enumerate(_COLUMNS)
    )
    body = "\n".join(_row(row) for row in rows)
    return (
        f'<table class="sorted"><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    )


def _head(name: str, note: str, *, text: bool) -> str:
    kind = ' data-text="1"' if text else ' class="n"'
    title = f' title="{escape(note)}"' if note else ""
    return f'<th scope="col"{kind}{title}><button type="button">{escape(name)}</button></th>'


def _row(row: Row) -> str:
    """Return a row; one without measurement gives the reason across the number columns."""
    setting = row.get("setting") or ""
    cells = [
        _cell(row.get("strategy"), row.get("strategy"), note=setting),
        _cell(row.get("group"), row.get("group")),
        _cell(row.get("source") or "–", row.get("source") or ""),
    ]
    status = row.get("status", "ok")
    if status != "ok":
        said = f"{_NOT.get(str(status), status)}: {row.get('reason') or 'no reason given'}"
        span = len(_COLUMNS) - _TEXTS
        cells.append(f'<td class="why" colspan="{span}">{escape(said)}</td>')
    else:
        cells += [_number(row, key) for _, key, _ in _COLUMNS[_TEXTS:]]
    mark = ' class="ours"' if row.get("strategy") == OURS else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _number(row: Row, key: str) -> str:
    value = number(row, key)
    if value is None:
        return _cell("–", "", of_number=True)
    shown = {
        "bytes": f"{value:,.0f}",
        "measurements": f"{value:,.0f}",
        "bpw": f"{value:.3f}",
        "kl": plus_minus(value, number(row, "kl_se")),
        "perplexity": f"{value:.2f}",
        "top1": f"{100 * value:.1f} %",
        "difference": plus_minus(value, number(row, "difference_se"), sign=True),
        "ratio": f"{value:.3f}",
        "rank": f"{value:.2f}",
    }[key]
    alike = key == "difference" and row.get("strategy") != OURS and standing(row) == "alike"
    return _cell(shown, repr(value), note="not significant" if alike else "", of_number=True)


def _cell(text: object, value: object, *, note: object = "", of_number: bool = False) -> str:
    small = f"<small>{escape(str(note))}</small>" if note else ""
    kind = ' class="n"' if of_number else ""
    return f'<td{kind} data-v="{escape(str(value))}">{escape(str(text))}{small}</td>'


def _counted(rows: Sequence[Row]) -> str:
    states = [str(row.get("status", "ok")) for row in rows]
    parts = [f"{states.count('ok')} measured"]
    parts += [
        f"{states.count(state)} {_NOT.get(state, state)}" for state in sorted(set(states) - {"ok"})
    ]
    return ", ".join(parts)
