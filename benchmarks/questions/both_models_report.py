"""The comparison of both reference models as one table, one picture, and all underlying rows.

    python -m bitknap.benchmarks.questions.both_models_report benchmarks/results

reads the `compare.MODEL.METHOD.json` there and writes `compare.md` and `compare.svg`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.benchmarks.questions.both_models_picture import picture
from bitknap.benchmarks.result_files import claim, read_results, write_report
from bitknap.report.figure_files import write_picture

Row = Mapping[str, Any]
_SURE = 2.0
_INTRODUCTION = """\
# Strategies at equal bytes

KL to the original in nats per token, on {judged:,} tokens of text that no strategy saw (a quarter
each of books, code, encyclopedia and speeches); ± is the standard error of a paired difference by
a moving-block bootstrap over windows. Every plan has at most the budget's bytes, scales and zeros
counted; a plan that cannot use them all is compared with Bitknap's (`ours`) at its bytes. Bitknap's
plan is calibrated (output Fisher × measured group gains), solved exactly, refined by measuring
{evaluations} plans on {refined:,} tokens of calibration text, and passes a gate against the best
uniform recipe there. Uniform recipes are chosen on the very text they are judged on. Published
rules choose among whole rows without zero points, as published; `ours-rows` chooses among the
same. Everything is in `compare.MODEL.METHOD.json`; repeat it with `{command}`.
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    paths = sorted(args.results.glob("compare.*.*.json"))
    claim(parser, args.results, "compare.md", "compare.svg", *(path.name for path in paths))
    documents = {
        path.name.removeprefix("compare.").removesuffix(".json"): read_results(path)
        for path in paths
    }
    if not documents:
        parser.exit(2, f"{args.results}: no compare.MODEL.METHOD.json there; run both_models\n")
    write_report(args.results / "compare.md", markdown(documents))
    write_picture(picture(documents), args.results / "compare.svg")


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the report on documents, given by model and method, then by profile."""
    first = next(iter(documents.values()))["free"]
    about = first["about"]
    steps = max(len(steps) for steps in first["refine"].values())
    lines = [
        _INTRODUCTION.format(
            judged=about["evaluation_tokens"],
            evaluations=steps,
            refined=about["refine_tokens"],
            command=about["command"],
        ),
        *_headline(documents),
        *_unlike(documents),
        *_overall(documents),
        *_profiles(documents),
        *_loops(documents),
        *_alike(documents),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join([*lines, "", f"{about['device']}; {versions}.", ""])


def rows_at(document: Mapping[str, Any], budget: str) -> dict[str, Row]:
    """Return the rows of a budget that have a plan, by strategy."""
    return {
        row["strategy"]: row
        for row in document["rows"]
        if row["budget"] == budget and row["status"] == "ok"
    }


def budgets(document: Mapping[str, Any]) -> list[str]:
    """Return the budgets in order."""
    return [entry["budget"] for entry in document["budgets"]]


def _cells(documents: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, dict[str, Row]]]:
    for name, profiles in documents.items():
        for budget in budgets(profiles["free"]):
            yield name, budget, rows_at(profiles["free"], budget)


def _least(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: float(row["kl"]), default=None)


def _headline(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| model, rounding | bpw | uniform | best published rule | best of all others | ours | "
        "over uniform | others − ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios, lowest, cells = [], 0, 0
    for name, budget, rows in _cells(documents):
        ours, uniform = rows["ours"], rows.get("uniform")
        rule = _least([row for row in rows.values() if row["group"] == "published"])
        others = [row for row in rows.values() if row["group"] != "ours"]
        best = _least(others)
        cells += 1
        if rule is not None:
            ratios.append(1 / rule["ratio"])
        verdict = ""
        if best is not None:
            gain, error = best["difference"], best["difference_se"]
            lowest += gain >= -error
            verdict = f"{gain:+.5f} ± {error:.5f}"
        lines.append(
            f"| {name.replace('.', ', ')} | {budget.removesuffix('bpw')} | {_kl(uniform)} | "
            f"{_kl(rule, named=True)} | {_kl(best, named=True)} | **{ours['kl']:.5f}** | "
            f"**{_ratio(ours, uniform)}** | {verdict} |"
        )
    mean = float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan")
    lines += [
        "",
        f"Bitknap has the lowest KL, or one within a standard error of the lowest, in {lowest} of "
        f"{cells} cells. Compared with the best published rule of each cell, at that rule's "
        f"bytes, its KL is {mean:.2f} times as high (geometric mean).",
    ]
    return lines


def _unlike(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the differences between runs: strategies, and plans that the loop measured."""
    lines = ["", "What differs between the runs:", ""]
    for name, profiles in documents.items():
        document = profiles["free"]
        plans = max(len(steps) for steps in document["refine"].values())
        strategies = {row["strategy"] for row in document["rows"]}
        published = {r["strategy"] for r in document["rows"] if r["group"] == "published"}
        lines.append(
            f"* {name.replace('.', ', ')}: {len(strategies)} strategies, {len(published)} of them "
            f"published rules; the loop measured {plans} plans"
        )
    return lines


def _kl(row: Row | None, *, named: bool = False) -> str:
    if row is None:
        return "–"
    return f"{row['kl']:.5f}" + (f" ({row['strategy']})" if named else "")


def _ratio(ours: Row, other: Row | None) -> str:
    return "–" if other is None else f"{ours['kl'] / other['kl']:.2f}"


def _overall(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the summary of every strategy over all of its cells."""
    every: dict[str, list[Row]] = {}
    for _, _, cell in _cells(documents):
        for name, row in cell.items():
            every.setdefault(name, []).append(row)
    lines = [
        "",
        "## Every strategy",
        "",
        "For each strategy: the geometric mean of its KL over that of Bitknap (ours) at the "
        "strategy's bytes, over all cells that it is in; in how many cells it is worse and "
        "better than Bitknap by more than two standard errors; its rank over the four domains, "
        "and KL readings on calibration text.",
        "",
        "| strategy | kind | KL over ours | worse | better | of | rank | readings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    every.pop("ours")
    means = {
        name: float(np.exp(np.mean([np.log(row["ratio"]) for row in judged])))
        for name, judged in every.items()
    }
    for name in sorted(every, key=lambda name: (means[name], name)):
        rows, mean = every[name], means[name]
        rank = float(np.mean([row["rank"] for row in rows]))
        worse = sum(row["difference"] > _SURE * row["difference_se"] for row in rows)
        better = sum(row["difference"] < -_SURE * row["difference_se"] for row in rows)
        lines.append(
            f"| {name} | {rows[0]['group']} | {mean:.3f} | {worse} | {better} | {len(rows)} | "
            f"{rank:.1f} | {rows[0]['measurements']} |"
        )
    return lines


def _profiles(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = list(next(iter(documents.values())))
    lines = [
        "",
        "## Under a runtime's grouping rule",
        "",
        "KL of Bitknap's plan where units must share a format as the profile says, and of the "
        "best uniform recipe.",
        "",
        f"| model, rounding | bpw | {' | '.join(names)} | uniform |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for name, profiles in documents.items():
        for budget in budgets(profiles["free"]):
            here = {profile: rows_at(document, budget) for profile, document in profiles.items()}
            values = " | ".join(f"{rows['ours']['kl']:.5f}" for rows in here.values())
            uniform = _kl(here["free"].get("uniform"))
            bits = budget.removesuffix("bpw")
            lines.append(f"| {name.replace('.', ', ')} | {bits} | {values} | {uniform} |")
    return lines


def _loops(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## What refining gained",
        "",
        "Measured on the calibration text that the plans were chosen on, and on text that "
        "nothing saw.",
        "",
        "| model, rounding | bpw | plans | accepted | KL there: before → after | KL unseen: before "
        "→ after | before − after | gate against uniform |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, budget, rows in _cells(documents):
        loop, before = documents[name]["free"]["loop"][budget], rows["ours-unrefined"]
        gate = f"{loop['gate_kl']:.5f} against {loop.get('gate_uniform_kl', float('nan')):.5f}"
        lines.append(
            f"| {name.replace('.', ', ')} | {budget.removesuffix('bpw')} | {loop['evaluations']} | "
            f"{loop['accepted']} | {loop['kl_before']:.5f} → {loop['kl_after']:.5f} | "
            f"{before['kl']:.5f} → {rows['ours']['kl']:.5f} | "
            f"{before['difference']:+.5f} ± {before['difference_se']:.5f} | {gate}, "
            f"{'passed' if loop['gate_passed'] else 'not passed: uniform is written'} |"
        )
    return lines


def _alike(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the differences that are not significant."""
    lines = [
        "",
        "## What is not significant",
        "",
        "Strategies that are within two standard errors of Bitknap, by cell:",
        "",
    ]
    for name, budget, rows in _cells(documents):
        alike = [
            row["strategy"]
            for row in rows.values()
            if row["group"] != "ours" and abs(row["difference"]) <= _SURE * row["difference_se"]
        ]
        lines.append(f"* {name.replace('.', ', ')}, {budget}: {_by_estimator(alike)}")
    return lines


def _by_estimator(names: Sequence[str]) -> str:
    """Return strategies, with the solvers of one estimator grouped."""
    solvers_of: dict[str, list[str]] = {}
    for name in names:
        first, _, solver = name.partition(":")
        solvers_of.setdefault(first, []).append(solver)
    parts = [
        f"{first} ({', '.join(sorted(solvers))})" if any(solvers) else first
        for first, solvers in solvers_of.items()
    ]
    return ", ".join(parts) or "none"


if __name__ == "__main__":
    main()
