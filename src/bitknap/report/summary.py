"""The summary of a report: what was compared, how Bitknap's plans rank, and significance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitknap.allocation.problem.budget import human
from bitknap.report.comparison_rows import (
    ERRORS,
    OURS,
    UNREFINED,
    Row,
    at,
    budgets_of,
    geometric_mean,
    number,
    rows_of,
    standing,
    verdicts,
)
from bitknap.report.strategy_table import plus_minus

_WORDS = {
    "higher": "Bitknap is lower",
    "lower": "Bitknap is higher",
    "alike": "not significant",
    "": "not compared",
}
# A line names at most this many formats or strategies and counts the rest.
_NAMED = 8


def facts(document: Mapping[str, Any]) -> list[list[str]]:
    """Return names and values of facts about the run; unknown ones are left out."""
    about = document.get("about") or {}
    formats = [str(name) for name in about.get("formats") or ()]
    versions = about.get("versions") or {}
    budgets = [_budget(entry) for entry in document.get("budgets") or ()]
    tokens = {
        "calibration": about.get("calibration_tokens"),
        "evaluation": about.get("evaluation_tokens"),
    }
    rows = {
        "model": about.get("model"),
        "fingerprint": about.get("fingerprint"),
        "rounding": about.get("method"),
        "profile": about.get("profile"),
        "units": _count(about.get("units"), about.get("weights")),
        "formats": f"{len(formats)}: {_some(formats)}" if formats else None,
        "budgets": "; ".join(budgets),
        "tokens": ", ".join(f"{count:,} {name}" for name, count in tokens.items() if count),
        "domains": ", ".join(map(str, about.get("domains") or ())),
        "seed": about.get("seed"),
        "device": about.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [[name, str(value)] for name, value in rows.items() if value not in (None, "")]


def sentences(document: Mapping[str, Any]) -> list[str]:
    """Return the outcome in sentences, the most important one first; none without rows."""
    if not rows_of(document):
        return []
    return [
        *_compared(document),
        *_against(document, "best uniform", "uniform recipe"),
        *_against(document, "best published", "published rule"),
        *_better(document),
        *_alike(document),
        *_refined(document),
        *_missing(document),
    ]


def verdict_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: Bitknap against the best of each kind at every budget."""
    head = ["budget", "against", "", "KL", "KL, Bitknap", "ratio", "difference", ""]
    rows = []
    for one in verdicts(document):
        mine = one.ours or {}
        ratio = number(one.row, "ratio")
        rows.append(
            [
                one.budget,
                one.role,
                str(one.row.get("strategy")),
                plus_minus(number(one.row, "kl"), number(one.row, "kl_se")),
                plus_minus(number(mine, "kl"), number(mine, "kl_se")),
                "–" if ratio is None else f"{ratio:.3f}",
                plus_minus(
                    number(one.row, "difference"), number(one.row, "difference_se"), sign=True
                ),
                _WORDS[one.word],
            ]
        )
    return head, rows


def _compared(document: Mapping[str, Any]) -> list[str]:
    rows, budgets = rows_of(document), budgets_of(document)
    strategies = len({str(row.get("strategy")) for row in rows})
    about = document.get("about") or {}
    tokens = about.get("evaluation_tokens")
    on = f" on {tokens:,} tokens that calibration did not see" if tokens else ""
    many = f"{strategies} {'strategy' if strategies == 1 else 'strategies'}"
    return [f"{many} at {_and(budgets)}, at equal bytes, measured{on}."]


def _against(document: Mapping[str, Any], role: str, kind: str) -> list[str]:
    known = [one for one in verdicts(document) if one.role == role and one.word]
    if not known:
        return []
    ratios = [number(one.row, "ratio") for one in known]
    mean = geometric_mean(1 / ratio for ratio in ratios if ratio is not None and ratio > 0)
    figure = f"is {mean:.3f} times as high in geometric mean; it is" if mean else "is"
    counts = []
    for word, said in (
        ("higher", "lower"),
        ("lower", "higher"),
        ("alike", "not significantly different"),
    ):
        where = [one.budget for one in known if one.word == word]
        if where:
            counts.append(f"{said} at {_and(where)}")
    against = f"Against the best {kind} of each budget, Bitknap's KL"
    return [f"{against} {figure} {'; '.join(counts)}."]


def _better(document: Mapping[str, Any]) -> list[str]:
    """Say which strategies beat Bitknap's, or that none does, if differences are known."""
    known = any(standing(row) for row in rows_of(document) if row.get("group") != OURS)
    if not known:
        return []
    which = f"lower than Bitknap's by more than {ERRORS:g} standard errors"
    rows = _others(document, "lower")
    return [f"KL {which}: {_who(rows)}." if rows else f"No strategy has a KL {which}."]


def _alike(document: Mapping[str, Any]) -> list[str]:
    rows = _others(document, "alike")
    many = f"Not significantly different, within {ERRORS:g} standard errors of Bitknap"
    return [f"{many}: {_who(rows)}."] if rows else []


def _others(document: Mapping[str, Any], word: str) -> list[Row]:
    """Return the rows whose `standing` is `word`, without variants of Bitknap's own."""
    return [
        row
        for budget in budgets_of(document)
        for row in at(document, budget)
        if row.get("group") != OURS and standing(row) == word
    ]


def _refined(document: Mapping[str, Any]) -> list[str]:
    """Say how refinement changed KL, from the row of the plan before it."""
    parts = []
    for budget in budgets_of(document):
        for row in at(document, budget):
            difference = number(row, "difference")
            if row.get("strategy") == UNREFINED and standing(row) and difference is not None:
                said = plus_minus(-difference, number(row, "difference_se"), sign=True)
                weak = " (not significant)" if standing(row) == "alike" else ""
                parts.append(f"at {budget} {said}{weak}")
    return [f"Refinement changed KL: {', '.join(parts)}."] if parts else []


def _missing(document: Mapping[str, Any]) -> list[str]:
    rows = rows_of(document)
    lines = []
    for status, said in (("unreachable", "Not reachable"), ("failed", "Failed")):
        some = [row for row in rows if row.get("status") == status]
        if some:
            lines.append(f"{said}, for the reason in the table: {_who(some)}.")
    return lines


def _who(rows: Sequence[Row]) -> str:
    """Name strategies and their budgets, separated by semicolons since names contain commas."""
    where: dict[str, list[str]] = {}
    for row in rows:
        where.setdefault(str(row.get("strategy")), []).append(str(row.get("budget")))
    return _some([f"{name} at {_and(budgets)}" for name, budgets in where.items()], "; ")


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _budget(entry: Mapping[str, Any]) -> str:
    size = entry.get("bytes")
    return str(entry.get("budget")) + ("" if size is None else f" ({human(size)})")


def _count(units: Any, weights: Any) -> str | None:
    if units is None:
        return None
    return f"{units:,}" + (f" of {weights:,} weights" if weights else "")


def _some(names: Sequence[str], comma: str = ", ") -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return comma.join(names[:_NAMED]) + more
