"""The results of the solver benchmark as a page and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Instances in the picture: one limit, growing size.
_GROWING = ("mixtral", "qwen3-30b", "36k", "deepseek-v3", "kimi-k2", "250k", "channels")
_HIGHS = ("pulp-highs", "scipy-highs")
_COLOURS = {
    "knapsack": "#0b5fa5",
    "greedy": "#5aa9e6",
    "ilp-highs": "#2a9d8f",
    "ilp-cbc": "#8ab17d",
    "pulp-cbc": "#d1495b",
    "pulp-highs": "#e07a1f",
    "scipy-highs": "#edae49",
    "cp-sat": "#7b4fa3",
    "mathopt-scip": "#b07cc6",
    "dp": "#6b705c",
    "bisection": "#a5a58d",
}


def late(row: Row) -> bool:
    """Return whether a solver was stopped by its time limit."""
    solving = row.get("seconds", 0.0) - row.get("build_seconds", 0.0)
    return row["status"] in ("feasible", "no plan") and bool(solving >= 0.95 * row["time_limit"])


def _solving(row: Row) -> float:
    """Return seconds without model building; for a stopped solver, its time limit."""
    if late(row):
        return float(row["time_limit"])
    return float(row["seconds"] - row.get("build_seconds", 0.0))


def targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return each target, its measured value, and "pass", "miss" or "not measured"."""
    by_pair = {(row["solver"], row["instance"]): row for row in rows if "seconds" in row}
    return [
        _agreement(by_pair),
        _speed(by_pair, 100, "PuLP/CBC", ("pulp-cbc",)),
        _speed(by_pair, 50, "HiGHS", _HIGHS),
        _ours(by_pair, "250k", seconds=1, megabytes=500, gap=1e-6),
        _ours(by_pair, "channels", seconds=5, megabytes=2000),
        _ours(by_pair, "36k+5", seconds=20, gap=1e-4),
        _ours(by_pair, "36k+10", seconds=20, gap=1e-4),
    ]


def _agreement(by_pair: Mapping[tuple[str, str], Row]) -> tuple[str, str, str]:
    text = "same objective as HiGHS within 1e-9, wherever HiGHS finished"
    worst, count = 0.0, 0
    for (solver, where), row in by_pair.items():
        ours = by_pair.get(("knapsack", where), {})
        if solver in _HIGHS and row["status"] == "optimal" and "objective" in ours:
            other = row["objective"]
            worst = max(worst, abs(ours["objective"] - other) / max(abs(other), 1e-300))
            count += 1
    if not count:
        return text, "", "not measured"
    return text, f"{worst:.1e} over {count} runs", "pass" if worst <= 1e-9 else "miss"


def _speed(
    by_pair: Mapping[tuple[str, str], Row], factor: int, label: str, solvers: Sequence[str]
) -> tuple[str, str, str]:
    text = f"at least {factor} times faster than {label} at 36,000 × 8, its model building left out"
    ours = by_pair.get(("knapsack", "36k"))
    others = [by_pair[name, "36k"] for name in solvers if (name, "36k") in by_pair]
    if ours is None or not others:
        return text, "", "not measured"
    best = min(others, key=_solving)
    ratio = _solving(best) / ours["seconds"]
    more = "more than " if late(best) else ""
    return text, f"{more}{ratio:,.0f} ({best['solver']})", "pass" if ratio >= factor else "miss"


def _ours(
    by_pair: Mapping[tuple[str, str], Row],
    where: str,
    *,
    seconds: float,
    megabytes: float | None = None,
    gap: float | None = None,
) -> tuple[str, str, str]:
    wanted = [(f"{seconds:g} s", "seconds", seconds, "{:.2f} s")]
    if megabytes:
        wanted.append((f"{megabytes:,.0f} MB", "peak_mb", megabytes, "{:,.0f} MB"))
    if gap:
        wanted.append((f"gap {gap:g}", "gap", gap, "gap {:.1e}"))
    text = f"{where}: at most " + ", ".join(item[0] for item in wanted)
    row = by_pair.get(("knapsack", where))
    if row is None:
        return text, "", "not measured"
    if "objective" not in row:
        return text, row["note"], "miss"
    met = all(row[key] is not None and row[key] <= most for _, key, most, _ in wanted)
    said = ", ".join(form.format(row[key]) for _, key, _, form in wanted if row[key] is not None)
    return text, said, "pass" if met else "miss"


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Solvers",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread; {versions}.",
        "",
        "Each solver meets each instance in a fresh process. Seconds are those of the solver "
        "alone, its own model building included; making the instance and the `Problem` is not. "
        "A solver stopped by its time limit counts with that limit. "
        "Runs below 2 s are the median of three; libraries are loaded before. Other tools are "
        f"asked for a relative gap of {about['relative_gap']:g}, ours for a proof. Peak "
        "memory is that of the whole process, Python and the instance included, or of its largest "
        "child process; *added* is the peak above what the loaded instance took. Objective, "
        "bytes and limits are computed again from the table, whatever a solver says.",
        "",
        *(f"- `{name}`: {text}" for name, text in about["solvers"].items()),
        "",
        "## Targets",
        "",
        "| target | measured | |",
        "|---|---|---|",
        *(f"| {text} | {said or '–'} | {verdict} |" for text, said, verdict in targets(rows)),
    ]
    for where in dict.fromkeys(row["instance"] for row in rows):
        lines += _table(where, [row for row in rows if row["instance"] == where])
    return "\n".join(lines) + "\n"


def _table(where: str, rows: Sequence[Row]) -> Iterator[str]:
    tried = [row for row in rows if "seconds" in row]
    size = next((row for row in rows if "units" in row), None)
    yield from ("", f"## {where}", "")
    if size:
        limits = f"{size['limits']} limit{'s' if size['limits'] > 1 else ''}"
        yield from (f"{size['units']:,} units × {size['formats']} formats, {limits}.", "")
    ours = next((row for row in tried if row["solver"] == "knapsack"), None)
    if tried:
        yield (
            "| solver | seconds | building | times slower than ours | status | gap | objective | "
            "bytes | peak MB | added MB |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in tried:
        spent, over, after = row["seconds"], "", ""
        if late(row):
            spent, over, after = row["time_limit"], "> ", f" (ended at {row['seconds']:.4g})"
        times = f"{spent / ours['seconds']:,.1f}" if ours else "–"
        building = row.get("build_seconds", 0.0)
        yield (
            f"| {row['solver']} | {over}{spent:.4g}{after} | "
            f"{f'{building:.3g}' if building > 1e-4 else '–'} | {over}{times} | {row['status']} | "
            f"{_number(row.get('gap'), '.1e')} | {_number(row.get('objective'), '.12g')} | "
            f"{_number(row.get('bytes'), ',')} | {row['peak_mb']:,.0f} | {row['over_mb']:,.0f} |"
        )
    for row in rows:
        if row.get("note"):
            yield from ("", f"`{row['solver']}` {row['status']}: {row['note']}.")


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw units against seconds for the growing instances as SVG; no picture if there are none."""
    import matplotlib
    from matplotlib.figure import Figure

    from bitknap.report.figure_files import write_picture

    shown = [row for row in rows if row["instance"] in _GROWING and "seconds" in row]
    if not shown:
        shown = [row for row in rows if "seconds" in row and row["limits"] == 1]
    with matplotlib.rc_context({"svg.hashsalt": "bitknap", "font.size": 10}):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        for solver, colour in _COLOURS.items():
            mine = sorted(
                (r["units"], r["seconds"], late(r)) for r in shown if r["solver"] == solver
            )
            if not mine:
                continue
            units, seconds, stopped = zip(*mine, strict=True)
            width = 2.6 if solver == "knapsack" else 1.4
            axes.plot(units, seconds, "-", color=colour, linewidth=width, label=solver, zorder=2)
            for stop, marker, face in ((False, "o", colour), (True, "^", "white")):
                points = [
                    (x, y) for x, y, s in zip(units, seconds, stopped, strict=True) if s == stop
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker, color=colour, mfc=face, ms=6)
        axes.set(xscale="log", yscale="log", xlabel="units (8 formats each)", ylabel="seconds")
        axes.set_title("Time to solve, one limit, one thread (open triangle: stopped by its limit)")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
        write_picture(figure, path)
