"""The benchmark of published rules as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bitknap.estimators.published import COMMON, RULES

_SURE = 2.0
_INTRODUCTION = """\
# Published rules beside Bitknap

Each rule plans with its own costs, its own ties and its own allocator. Bitknap plans with
`Calibrated(base=Fisher(space="output"))`, exact knapsack, profile `gate_eq_up`, at the bytes of
the rule's plan or less. All have the same weights, the same rounding (RTN) and the same formats
(int1 to int4, whole rows, symmetric; MC-MoE, GEMQ and Chowdhury et al. take three widths, as
published). A rule with a byte limit gets the budget; for any other rule, its knob is scanned for
the largest plan within the budget. Metadata counts, so 2.0 bits per weight hold codes of about
1.92 bits.

KL to the original in nats per token, on text that no plan was made with. The difference is the
rule's KL minus Bitknap's, paired by windows, ± one standard error. The ratio is the rule's KL over
Bitknap's: above 1, Bitknap is better. **Bold**: more than two standard errors from equal.

The uniform recipe is the best of all group sizes, zero points and metadata, pure or mixed, chosen
on the judge's own text. What differs from the papers, in favour of the rules or because data is
missing:

{differences}
"""


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report on all measurements."""
    models = document["models"].values()
    parts = [_INTRODUCTION.format(differences=_differences())]
    for model in models:
        parts += _model(model)
    parts += _overall(models)
    parts += _claims(models)
    about = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts.append(f"\n{about['cpu']}, {about['threads']} thread(s); {versions}.")
    return "\n".join(parts) + "\n"


def _differences() -> str:
    """Return the parts that are not reproduced, from the table of published methods."""
    lines = [f"- all: {' '.join(COMMON)}"]
    return "\n".join(
        lines + [f"- {entry.title}: {' '.join(entry.missing)}" for entry in RULES.values()]
    )


def geometric_mean(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the geometric mean of the rows' ratios; NaN if there are none."""
    ratios = [row["ratio"] for row in rows if row["bytes"]]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan")


def _model(model: Mapping[str, Any]) -> list[str]:
    lines = [
        f"\n## reference:{model['model']}\n",
        f"{model['units']} units; calibrated on {model['tokens']:,} tokens, Bitknap with "
        f"{model['measurements']} KL readings; judged on {model['judged_on']:,} other tokens.",
        "",
    ]
    head = ["rule", "budget", "its bpw", "knob", "KL", "Bitknap", "rule − Bitknap", "ratio"]
    lines += _table(head, [_line(row) for row in model["rows"]])
    behind = [
        row for row in model["rows"] if row["bytes"] and not (row["difference"] > 0 and _sure(row))
    ]
    if not behind:
        return [*lines, "", "Bitknap is better everywhere, by more than two standard errors."]
    lines += ["", "Where Bitknap is not better by two standard errors, and why:", ""]
    return lines + [
        f"- {row['rule']} at {row['budget']} bpw, ratio {row['ratio']:.3f}: {why(row)}"
        for row in behind
    ]


def _line(row: Mapping[str, Any]) -> list[str]:
    start = [row["rule"], str(row["budget"])]
    if not row["bytes"]:
        return [*start, "–", "no plan fits", "–", "–", "–", "–"]
    mark = "**" if _sure(row) else ""
    return [
        *start,
        f"{row['bpw']:.3f}",
        row["setting"] or row["knob"],
        f"{row['kl']:.4f}",
        f"{row['ours_kl']:.4f}",
        f"{row['difference']:+.4f} ± {row['difference_se']:.4f}",
        f"{mark}{row['ratio']:.2f}{mark}",
    ]


def _sure(row: Mapping[str, Any]) -> bool:
    return abs(float(row["difference"])) > _SURE * float(row["difference_se"])


def why(row: Mapping[str, Any]) -> str:
    """Return why Bitknap's plan is not better in a row, from the measurements."""
    if row["difference"] == 0:
        return "the two plans round the model identically."
    if not _sure(row):
        return "the plans are less than two standard errors apart, which decides nothing."
    free = row["ours_free_kl"]
    if free < row["kl"]:
        return (
            "Bitknap's plan is tied (gate = up) and the rule's is not: without the tie Bitknap "
            f"has {free:.4f} against {row['kl']:.4f}."
        )
    if row["predicted"] is None:
        return "it chooses among grids or rows that Bitknap was not given."
    if row["predicted"] < row["ours_predicted"]:
        return (
            f"Bitknap's costs prefer the rule's plan too ({row['predicted']:.4f} against "
            f"{row['ours_predicted']:.4f} nats), but gate = up forbids it; and losses do not add "
            "up exactly."
        )
    return (
        f"Bitknap's costs predict {row['predicted']:.4f} nats for the rule's plan and "
        f"{row['ours_predicted']:.4f} for Bitknap's, but {row['kl']:.4f} and {row['ours_kl']:.4f} "
        "are measured, so the costs misjudge units or do not add up here."
    )


def _overall(models: Any) -> list[str]:
    """Return the geometric mean of the ratio by rule, for each model and all together."""
    every = [(model["model"], row) for model in models for row in model["rows"]]
    columns = list(dict.fromkeys(name for name, _ in every))
    body = []
    for rule in dict.fromkeys(row["rule"] for _, row in every):
        mine = [(name, row) for name, row in every if row["rule"] == rule]
        each = [geometric_mean([row for name, row in mine if name == c]) for c in columns]
        rows = [row for _, row in mine if row["bytes"]]
        wins = sum(row["difference"] > 0 for row in rows)
        sure = sum(row["difference"] > 0 and _sure(row) for row in rows)
        ratios = [*each, geometric_mean(rows)]
        body.append(
            [
                rule,
                rows[0]["source"] if rows else "",
                rows[0]["knob"] if rows else "",
                rows[0]["ties"] if rows else "",
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{wins} of {len(rows)} ({sure})",
            ]
        )
    lines = [
        "\n## All budgets together\n",
        "Geometric mean of the ratio of the rule's KL to Bitknap's, and at how many budgets "
        "Bitknap is better (in brackets: by more than two standard errors).",
        "",
    ]
    return lines + _table(
        ["rule", "source", "knob", "ties", *columns, "all", "Bitknap better"], body
    )


def _claims(models: Any) -> list[str]:
    lines = [
        "\n## What papers claim\n",
        "Ranks are within layers, over experts that saw tokens. A claim on ranks is decided if "
        "the mean of the layers' correlations is two standard deviations of chance from 0; a "
        "claim on plans is decided by the budgets at which they differ by two standard errors.",
        "",
    ]
    return lines + claims_table(models)


def claims_table(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the verdicts on claims for each model, one line per claim."""
    body = [
        [
            claim["claim"],
            claim["source"],
            model["model"],
            f"**{claim['verdict']}**",
            _figures(claim),
        ]
        for model in models
        for claim in model["claims"]
    ]
    return _table(["claim", "source", "model", "verdict", "figures"], body)


def _figures(claim: Mapping[str, Any]) -> str:
    known = claim["figures"]
    parts = []
    if "ratio" in known:
        parts.append(
            f"sensitivity per weight, down over up, by layer at {known['at']}: "
            f"{_numbers(known['ratio'])}; mean bits at {known['budget']} bpw: down "
            f"{_numbers(known['bits_down'])}, up {_numbers(known['bits_up'])}"
        )
    if "mean" in known:
        parts.append(
            f"by layer {_numbers(known['correlation'])}, mean {known['mean']:+.2f} ± "
            f"{known['deviation']:.2f} of chance"
        )
    if "plans" in known:
        each = [
            f"{row['with']:.4f} / {row['without']:.4f} at {row['budget']}" for row in known["plans"]
        ]
        parts.append(f"KL of plans with / without: {', '.join(each)}")
    if claim.get("also"):
        parts.append(claim["also"])
    return "; ".join(parts)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]
