"""The profiling benchmark as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INTRODUCTION = """\
# Estimators against dense profiling

Dense profiling rounds one unit at a time and reads the model's true KL: {formats}. Every other
estimator is ranked against it (Spearman's correlation over units that saw tokens, each format by
itself and all together), and its plans are judged on text that no estimator saw: KL to the
original in nats a token, and in brackets the paired difference to the plan of dense profiling at
the same budget, in percent of the dense plan's KL, ± one standard error. Bold: more than two
standard errors worse or better than dense. Profile `gate_eq_up`, exact knapsack everywhere.
"""

_OURS = "calibrated(fisher-output)"


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report on all measurements."""
    models = document["models"]
    first = next(iter(models.values()))
    names = ", ".join(first["rows"][0]["spearman"])
    parts = [_INTRODUCTION.format(formats=names)]
    for model in models.values():
        parts += _model(model)
    about = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts.append(f"{about['cpu']}, {about['threads']} thread; {versions}.")
    return "\n".join(parts) + "\n"


def _model(model: Mapping[str, Any]) -> list[str]:
    rows = model["rows"]
    dense = rows[0]
    budgets = list(dense["plans"])
    text = (
        f"{model['units']} units, {model['unseen']} of experts without tokens; measured on "
        f"{model['tokens']:,} tokens, plans judged on {model['judged_on']:,} others. Dense: "
        f"{dense['measurements']:,} measurements"
    )
    text += f" in {dense['seconds']:.0f} s." if dense["seconds"] else ", read from their journal."
    singles = [row for row in rows if "seed" not in row]
    lines = [f"\n## reference:{model['model']}\n", text, ""]
    lines += _table(
        ["estimator", "measured", *dense["spearman"], "all", *(f"{b} bpw" for b in budgets)],
        [_line(row, dense, budgets) for row in singles],
    )
    lines += ["", _lowest(singles, budgets)]
    drawn = [row for row in rows if "seed" in row]
    if drawn:
        lines += _sparse(drawn, dense)
    if model.get("checks"):
        lines += _checks(model["checks"])
    return lines


def _lowest(rows: Sequence[Mapping[str, Any]], budgets: Sequence[str]) -> str:
    """Say at which budgets the best calibrated base loses least of all estimators."""
    ours = [row for row in rows if row["estimator"] == _OURS]
    others = [row for row in rows[1:] if "calibrated" not in row["estimator"]]
    if not ours or not others:
        return ""
    best = max(ours, key=lambda row: int(row["measurements"]))
    said = []
    for bits in budgets:
        kl = best["plans"][bits]["kl"]
        other = min(others, key=lambda row: float(row["plans"][bits]["kl"]))
        theirs = other["plans"][bits]["kl"]
        word = "least" if kl < theirs else f"{100 * (kl / theirs - 1):.1f} % over the least"
        said.append(f"{bits} bpw {word} ({kl:.5f}, {other['estimator']} {theirs:.5f})")
    return (
        f"{_OURS} with {best['measurements']} readings against the best estimator that is not "
        f"calibrated: {'; '.join(said)}. Formats end at 4 bits, so at 3.0 most units get 3 or 4 "
        "whatever the costs say: good estimators differ by a percent or two there, and the few "
        "readings' own noise decides."
    )


def _checks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how well tables predict whole plans."""
    lines = [
        "",
        "Predicted against measured KL of whole plans of equal bytes, near the frontier and at "
        "random, on held-out text: rank correlation, slope of log KL over log prediction (1 is "
        "perfect), true over predicted sum, and regret, the KL of the plan that the table likes "
        "best over the least KL.",
        "",
    ]
    head = ["estimator", "bpw", "Spearman", "slope", "true / predicted", "regret"]
    body = [
        [
            row["estimator"],
            str(row["bits"]),
            *(f"{row[key]:.2f}" for key in ("spearman", "slope", "scale", "regret")),
        ]
        for row in rows
    ]
    return lines + _table(head, body)


def _line(row: Mapping[str, Any], dense: Mapping[str, Any], budgets: Sequence[str]) -> list[str]:
    cells = [row["estimator"], f"{row['measurements']:,}"]
    cells += [f"{value:.2f}" for value in row["spearman"].values()]
    cells.append(f"{row['spearman_all']:.2f}")
    return cells + [_cell(row["plans"][bits], dense["plans"][bits]["kl"]) for bits in budgets]


def _cell(plan: Mapping[str, Any], dense: float) -> str:
    over, error = plan["over_dense"] / dense, plan["over_dense_se"] / dense
    mark = "**" if abs(over) > 2 * error and error > 0 else ""
    return f"{plan['kl']:.4f} ({mark}{100 * over:+.1f} ± {100 * error:.1f} %{mark})"


def _sparse(drawn: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> list[str]:
    """Return the table of sparse estimators, with means over the seeds."""
    seeds = len({row["seed"] for row in drawn})
    count = min(row["measurements"] for row in drawn[1:] or drawn)
    lines = [
        "",
        f"From {count} measured cells, drawn at random among those of experts that saw tokens, "
        f"{seeds} seeds. Time is a share of dense profiling's, in the same process, with the base "
        "and the measurements. KL are means over seeds; in brackets the mean difference to the "
        "dense plan ± its mean paired standard error over windows, and behind the stroke its "
        "standard deviation over seeds. Over a base, rules learn what the base gets wrong and are "
        "followed as far as they predict units left out.",
        "",
    ]
    names = list(dict.fromkeys(row["estimator"] for row in drawn))
    budgets = list(drawn[0]["plans"])
    body = []
    for name in names:
        mine = [row for row in drawn if row["estimator"] == name]
        cells = [name, f"{mine[0]['measurements']}", f"1/{1 / _mean(mine, 'share'):.0f}"]
        cells.append(f"{_mean(mine, 'spearman_all'):.3f}")
        cells += [
            _over([row["plans"][bits] for row in mine], dense["plans"][bits]["kl"])
            for bits in budgets
        ]
        body.append(cells)
    head = ["way", "measured", "time", "Spearman, all", *(f"{b} bpw" for b in budgets)]
    return lines + _table(head, body)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _over(plans: Sequence[Mapping[str, Any]], dense: float) -> str:
    """Return the mean KL of the seeds' plans, and by how much it exceeds the dense plan's."""
    over = 100 * np.array([plan["over_dense"] for plan in plans]) / dense
    error = 100 * _mean(plans, "over_dense_se") / dense
    seeds = f" / {np.std(over):.1f}" if len(plans) > 1 else ""
    return f"{_mean(plans, 'kl'):.4f} ({np.mean(over):+.1f} ± {error:.1f}{seeds} %)"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]
