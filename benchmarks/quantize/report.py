"""The benchmark of quantizers as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitknap.benchmarks.quantize.large_checkpoint import MOST_MEMORY
from bitknap.benchmarks.quantize.quality import BASE, WITHIN
from bitknap.benchmarks.quantize.speed import OURS, PLAIN

Row = Mapping[str, Any]
_HALF = 0.5


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report on all measurements."""
    about = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Quantizers",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread(s); {versions}. "
        f"Load when it began: {about['load']:.1f} processes.",
        "",
        "## Targets",
        "",
        "| target | measured | |",
        "|---|---|---|",
        *(f"| {text} | {said or '–'} | {verdict} |" for text, said, verdict in targets(document)),
    ]
    if document.get("speed"):
        lines += _speed(document["speed"], document.get("profile", {}))
    for model in document.get("quality", []):
        lines += _quality(model)
    if document.get("large"):
        lines += _large(document["large"])
    return "\n".join(lines) + "\n"


def targets(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each target, its measured value, and "pass", "miss" or "not measured"."""
    quality = [row for model in document.get("quality", []) for row in _rows_of(model)]
    return [
        _speed_target(document.get("speed", [])),
        _quality_target(quality, "gptq", "GPTQ with default scales", lambda way: "mse" not in way),
        _quality_target(quality, "gptq", "GPTQ with searched scales", lambda way: "mse" in way),
        _quality_target(quality, "hqq", "HQQ", lambda way: True),
        _memory_target(document.get("large")),
    ]


def _rows_of(model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in model["rows"]:
        yield {"model": model["model"], **row}


def _speed_target(rows: Sequence[Row]) -> tuple[str, str, str]:
    text = "RTN with clipping search and packing: at least half the best peer's min-max RTN"
    ratios = []
    for row in rows:
        if row["way"] == OURS:
            plain = _rate_of(rows, row, PLAIN)
            if plain:
                ratios.append(row["gb_per_second"] / plain)
    if not ratios:
        return text, "", "not measured"
    said = f"{min(ratios):.2f} to {max(ratios):.2f} times over {len(ratios)} comparisons"
    return text, said, "pass" if min(ratios) >= _HALF else "miss"


def _rate_of(rows: Sequence[Row], like: Row, ways: Sequence[str]) -> float:
    """Return the best rate of some ways at the shape and format of a row; 0 if there is none."""
    same = [row for row in rows if all(row[key] == like[key] for key in ("shape", "format"))]
    return max((row.get("gb_per_second", 0.0) for row in same if row["way"] in ways), default=0.0)


def _quality_target(
    rows: Sequence[Row], family: str, label: str, chosen: Any
) -> tuple[str, str, str]:
    text = f"KL within {WITHIN - 1:.0%} of the best peer's {label}, or better"
    ratios: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["family"] != family or row["way"].startswith("ours") or not chosen(row["way"]):
            continue
        key = row["model"], row["format"]
        ratio = (row["kl"] - row["over_ours"]) / row["kl"]
        ratios[key] = max(ratio, ratios.get(key, 0.0))
    if not ratios:
        return text, "", "not measured"
    missed = [key for key, ratio in ratios.items() if ratio > WITHIN]
    said = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} of it, {len(ratios)} formats"
    if missed:
        said += "; above: " + ", ".join(" ".join(key) for key in missed)
    return text, said, "miss" if missed else "pass"


def _memory_target(large: Mapping[str, Any] | None) -> tuple[str, str, str]:
    text = f"planned and quantized with a peak under {MOST_MEMORY >> 30} GiB"
    if not large:
        return text, "", "not measured"
    peak = max(step["peak_bytes"] for step in large["steps"].values())
    said = f"{peak / 2**30:.2f} GiB for {large['source_bytes'] / 1e9:.1f} GB"
    return text, said, "pass" if peak < MOST_MEMORY else "miss"


def _speed(rows: Sequence[Row], profile: Mapping[str, float]) -> Iterator[str]:
    yield from ("", "## Throughput", "")
    yield (
        "GB of bf16 weights a second; median of measurements taken turn about, GPTQ once on a "
        "whole matrix. In brackets: times the best min-max rounding of a peer at the same shape "
        "and format."
    )
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == shape]
        formats = list(dict.fromkeys(row["format"] for row in here))
        yield from ("", f"### {shape}", "")
        body = []
        for way in dict.fromkeys(row["way"] for row in here):
            mine = {row["format"]: row for row in here if row["way"] == way}
            body.append([way, *(_rate(here, mine.get(name)) for name in formats)])
        yield from _table(["way", *formats], body)
    if profile:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in profile.items())
        yield from ("", f"Share of the time of Bitknap's search and packing: {shares}.")


def _rate(rows: Sequence[Row], row: Row | None) -> str:
    if row is None:
        return "–"
    if "note" in row:
        return str(row["note"])
    plain = _rate_of(rows, row, PLAIN)
    beside = f" ({row['gb_per_second'] / plain:.2g})" if plain else ""
    return f"{row['gb_per_second']:.3g}{beside}"


def _quality(model: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## reference:{model['model']}", "")
    yield (
        f"KL to the original in nats a token on {model['judged_on']:,} held-out tokens; second "
        f"moments of {model['tokens']:,} calibration tokens, the same for every way. In brackets "
        f"the paired difference to {', '.join(BASE.values())}, ± one standard error."
    )
    yield ""
    formats = list(dict.fromkeys(row["format"] for row in model["rows"]))
    body = []
    for way in dict.fromkeys(row["way"] for row in model["rows"]):
        mine = {row["format"]: row for row in model["rows"] if row["way"] == way}
        body.append([way, *(_loss(mine.get(name)) for name in formats)])
    yield from _table(["way", *formats], body)


def _loss(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["way"] in BASE.values():
        return f"{row['kl']:.5f}"
    return f"{row['kl']:.5f} ({row['over_ours']:+.5f} ± {row['over_ours_se']:.5f})"


def _large(large: Mapping[str, Any]) -> Iterator[str]:
    part = f", {large['layers']} layers" if large["layers"] else ""
    yield from ("", "## A large checkpoint", "")
    yield (
        f"Made up in the shapes of {large['model']}{part}: {large['source_bytes'] / 1e9:.1f} GB, "
        f"planned with {large['estimator']} over three formats for {large['budget']}, "
        f"{large['written_bytes'] / 1e9:.2f} GB written."
    )
    yield ""
    body = [
        [verb, f"{step['seconds']:.0f}", f"{step['peak_bytes'] / 2**30:.2f}"]
        for verb, step in large["steps"].items()
    ]
    yield from _table(["command", "seconds", "peak GiB"], body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for cells in body:
        yield "| " + " | ".join(cells) + " |"
