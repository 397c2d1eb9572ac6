"""The kernel benchmark as a page and as a roofline picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitknap.benchmarks.kernels.cases import KEPT, MIXES, MODELS, OTHER
from bitknap.benchmarks.kernels.cpu_report import cpu_section
from bitknap.benchmarks.kernels.peers import GATE_UP, OURS, TRANSFORMERS
from bitknap.benchmarks.kernels.timing import memory_roof

Row = Mapping[str, Any]
_MIXTRAL, _SMALL = MODELS[:1], MODELS[1:]
_MIXED, _UNIFORM = "2+3+4+8", "4"
_LIGHT, _THREE = "2+3+4", "3"
_COLOURS = {
    "2": "#0b5fa5",
    "3": "#2a9d8f",
    "4": "#d1495b",
    "8": "#7b4fa3",
    "2+3+4": "#edae49",
    "2+3+4+8": "#e07a1f",
    OTHER: "#8ab17d",
    KEPT: "#6b705c",
}
_MARKERS = dict(zip(MODELS, "os^", strict=True))


class Target(NamedTuple):
    """A target of the benchmark, and what it takes to pass.

    Attributes:
        text: its description.
        least: value that must be reached.
        aim: value that should be reached.
        values: returns the measured values, one per case.
        form: format string of a value.
    """

    text: str
    least: float
    aim: float
    values: Callable[[Sequence[Row]], list[float]]
    form: str = "{:.0%}"


def _shares(
    models: Sequence[str], batches: range, mixes: Sequence[str] = (_UNIFORM,)
) -> Callable[[Sequence[Row]], list[float]]:
    def values(rows: Sequence[Row]) -> list[float]:
        return [
            row["share"]
            for row in rows
            if row["model"] in models
            and row["batch"] in batches
            and row["mix"] in mixes
            and row["routing"] == "uniform"
        ]

    return values


def _bandwidths(mixed: str, uniform: str) -> Callable[[Sequence[Row]], list[float]]:
    """Return bytes per second of a mix over those of the uniform width with as many bytes."""

    def values(rows: Sequence[Row]) -> list[float]:
        by_key = {_key(row): row for row in rows if row["batch"] <= 64}
        return [
            (row["bytes"] / row["seconds"]) / (other["bytes"] / other["seconds"])
            for row in by_key.values()
            if row["mix"] == mixed and (other := by_key.get(_key(row, mix=uniform)))
        ]

    return values


def _over_kept(rows: Sequence[Row]) -> list[float]:
    by_key = {_key(row, group=0): row for row in rows if row["group"] == 128 and row["batch"] <= 16}
    return [
        other["seconds"] / row["seconds"]
        for row in by_key.values()
        if row["mix"] == _UNIFORM and (other := by_key.get(_key(row, mix=KEPT, group=0)))
    ]


def _prefill(rows: Sequence[Row]) -> list[float]:
    return [
        row["flops"] / row["seconds"] / row["peak"]
        for row in rows
        if row["batch"] in range(512, 4097) and row["mix"] in (_UNIFORM, _MIXED)
    ]


TARGETS = (
    Target("Mixtral, batch 1: of the memory roof", 0.55, 0.75, _shares(_MIXTRAL, range(1, 2))),
    Target("Mixtral, batch 4–32: of the roof", 0.65, 0.80, _shares(_MIXTRAL, range(4, 33))),
    Target("Qwen3, DeepSeek, batch 1: of the roof", 0.30, 0.50, _shares(_SMALL, range(1, 2))),
    Target("Qwen3, DeepSeek, batch 8–64: of the roof", 0.60, 0.75, _shares(_SMALL, range(8, 65))),
    Target("2 bits, batch 4–64: of their roof", 0.50, 0.70, _shares(MODELS, range(4, 65), ("2",))),
    Target("3 bits, batch 4–64: of their roof", 0.55, 0.75, _shares(MODELS, range(4, 65), ("3",))),
    Target(
        "2, 3, 4 and 8 bits over uniform 4, bytes a second",
        *(0.92, 0.97, _bandwidths(_MIXED, _UNIFORM), "{:.2f}"),
    ),
    Target(
        "2, 3 and 4 bits over uniform 3, bytes a second",
        *(0.92, 0.97, _bandwidths(_LIGHT, _THREE), "{:.2f}"),
    ),
    Target("4 bits over our bf16 kernel, batch 1–16", 2.5, 3.2, _over_kept, "{:.2f}"),
    Target("prefill of 512–4096: of the matmul peak", 0.40, 0.50, _prefill),
)


def targets(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each target, its measured value, and "pass", "aim", "miss" or "not measured"."""
    every = [] if document.get("toy") else [r for r in document.get("rows", []) if "seconds" in r]
    peak = document.get("ceilings", {}).get("matmul", float("inf"))
    ours = [{**row, "peak": peak} for row in every if row["way"] == OURS]
    judged = []
    for target in TARGETS:
        low, high = target.form.format(target.least), target.form.format(target.aim)
        text = f"{target.text}: at least {low}, aim {high}"
        judged.append((text, *_verdict(target.values(ours), target.least, target.aim, target.form)))
    text = "prefill of 512–4096: never below 0.6 × transformers' grouped_mm in bf16"
    return [*judged, (text, *_verdict(_over_grouped(every), 0.6, 1.0, "{:.2f}"))]


def _verdict(values: Sequence[float], least: float, aim: float, form: str) -> tuple[str, str]:
    if not values:
        return "", "not measured"
    said = f"{form.format(min(values))} to {form.format(max(values))} in {len(values)} cases"
    return said, "aim" if min(values) >= aim else "pass" if min(values) >= least else "miss"


def _over_grouped(rows: Sequence[Row]) -> list[float]:
    grouped = {
        _key(row, group=0): row["seconds"]
        for row in rows
        if row["way"] == f"transformers {TRANSFORMERS[-1]}"
    }
    return [
        other / row["seconds"]
        for row in rows
        if row["way"] == OURS
        and row["batch"] in range(512, 4097)
        and row["mix"] in (_UNIFORM, _MIXED)
        and (other := grouped.get(_key(row, mix=KEPT, group=0)))
    ]


def _key(row: Row, **other: Any) -> tuple[Any, ...]:
    named = {name: row[name] for name in ("model", "mix", "group", "batch", "routing", "dtype")}
    return tuple((named | other).values())


def markdown(document: Mapping[str, Any]) -> str:
    """Return the page."""
    lines = ["# Kernels", "", *_head(document), "", "## Targets", ""]
    lines += ["| target | measured | |", "|---|---|---|"]
    lines += [f"| {text} | {said or '–'} | {mark} |" for text, said, mark in targets(document)]
    rows = document.get("rows", [])
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += _model([row for row in rows if row["model"] == model])
    if document.get("cpu"):
        lines += cpu_section(document["cpu"])
    return "\n".join(lines) + "\n"


def _head(document: Mapping[str, Any]) -> Iterator[str]:
    about, ceilings = document.get("about"), document.get("ceilings", {})
    if about is None:
        yield (
            "**No GPU was available, so no kernel was timed on one and the figures for GPUs are "
            "missing.** On a GPU, `python -m bitknap.benchmarks.kernels -o benchmarks/results` "
            "fills in this page. What is measured below is the path of a machine without a GPU."
        )
        return
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield f"{about.get('device', about['cpu'])}, {about['date']}; {versions}."
    yield ""
    if "note" in about:
        yield about["note"]
        yield ""
    if document.get("toy"):
        yield "**A toy run: it shows that everything runs, but not how fast.**"
        yield ""
    yield (
        f"Measured in the same run: {ceilings['read'] / 1e9:,.1f} GB/s read, "
        f"{ceilings['copy'] / 1e9:,.1f} GB/s copied (both ways counted), "
        f"{ceilings['matmul'] / 1e12:,.3g} TFLOP/s of bf16 matmul. The roof of a case is the "
        "greater of its bytes over the faster of the first two and its products over the last. "
        "Times are medians in CUDA graphs of 20 calls or more that take other weights each time; "
        "* marks what cannot be in a graph."
    )


def _model(rows: Sequence[Row]) -> Iterator[str]:
    plain = [r for r in rows if r["routing"] == "uniform" and r["dtype"] != "fp16"]
    groups = sorted({r["group"] for r in plain}, reverse=True)
    batches = sorted({r["batch"] for r in plain})
    yield from ("", f"## {rows[0]['model']}", "", "µs a layer, and share of its roof.", "")
    yield "| way, widths, group | " + " | ".join(f"{b}" for b in batches) + " |"
    yield "|---" * (len(batches) + 1) + "|"
    ways = list(dict.fromkeys(row["way"] for row in plain))
    for way in ways:
        for mix in MIXES:
            for group in groups:
                some = {
                    r["batch"]: r
                    for r in plain
                    if (r["way"], r["mix"], r["group"]) == (way, mix, group)
                }
                if some:
                    cells = (_cell(some.get(batch)) for batch in batches)
                    yield f"| {way}, {mix}, {group} | " + " | ".join(cells) + " |"
    other = [r for r in rows if r not in plain and r["way"] == OURS]
    if other:
        yield from ("", "| routing, dtype, widths, batch | ours |", "|---|---|")
    for row in other:
        yield f"| {row['routing']}, {row['dtype']}, {row['mix']}, {row['batch']} | {_cell(row)} |"
    yield from _price(rows)


def _price(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the cost of different widths for gate and up of one expert."""
    by_key = {_key(row): row for row in rows if "seconds" in row and row["way"] in (OURS, GATE_UP)}
    ratios = {
        row["batch"]: row["seconds"] / other["seconds"]
        for row in by_key.values()
        if row["mix"] == OTHER and (other := by_key.get(_key(row, mix=_MIXED)))
    }
    if ratios:
        said = ", ".join(f"{ratio:.2f} at {batch}" for batch, ratio in sorted(ratios.items()))
        yield from ("", f"Gate and up at different widths, in multiples of the tied mix: {said}.")


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if "note" in row:
        return "does not run"
    mark = "" if row["graph"] else "*"
    return f"{row['seconds'] * 1e6:,.1f}{mark} ({row['share']:.0%})"


def picture(document: Mapping[str, Any], path: Path) -> None:
    """Draw FLOP/s against FLOP per byte under the measured roofline, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    from bitknap.report.figure_files import write_picture

    ceilings = document["ceilings"]
    rows = [
        row
        for row in document["rows"]
        if row["way"] == OURS and "seconds" in row and row["routing"] == "uniform"
    ]
    with matplotlib.rc_context({"svg.hashsalt": "bitknap", "font.size": 10}):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        memory = memory_roof(ceilings)
        knee = ceilings["matmul"] / memory
        ends = [min([r["flops"] / r["bytes"] for r in rows] + [knee]) / 2, knee, knee * 8]
        roof = [min(x * memory, ceilings["matmul"]) / 1e12 for x in ends]
        axes.plot(ends, roof, color="#222222", linewidth=2, label="measured roof")
        for mix, colour in _COLOURS.items():
            for model in dict.fromkeys(row["model"] for row in rows):
                points = sorted(
                    (r["flops"] / r["bytes"], r["flops"] / r["seconds"] / 1e12)
                    for r in rows
                    if (r["mix"], r["model"]) == (mix, model)
                )
                if points:
                    marker = _MARKERS.get(model, "o")
                    label = f"{model}, {mix}"
                    axes.plot(*zip(*points, strict=True), marker, color=colour, ms=5, label=label)
        axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
        device = document["about"].get("device", "toy run, no speed")
        axes.set_title(f"Mixed-bit expert layers under the roof, {device}")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        write_picture(figure, path)
