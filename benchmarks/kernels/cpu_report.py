"""Tables of the results without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WAYS = ("plain", "all cached", "nothing cached")


def cpu_section(cpu: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on packed experts on a CPU."""
    about = cpu["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield from ("", "## Without a GPU", "")
    yield (
        f"{about['cpu']}, {about['cores']} cores, one thread, {about['date']}; {versions}. Other "
        f"work was on the machine (load {about['load']:.1f}): seconds are those of the processor, "
        "medians of one run, the ways turn about, and only their ratios mean much."
    )
    yield from ("", "Matrices dequantized to bf16, GB of bf16 a second:", "")
    yield from ("| format | plain streams | tiles |", "|---|---|---|")
    rates = {(r["format"], r["layout"]): r["gb_per_second"] for r in cpu["rates"]}
    for name in dict.fromkeys(r["format"] for r in cpu["rates"]):
        yield f"| {name} | {rates[name, 'plain']:.2f} | {rates[name, 'tiles']:.2f} |"
    yield from (
        "",
        "One layer's experts, packed, over transformers' own module with the same weights "
        "dequantized (`grouped_mm`): ms, and times the plain module.",
        "",
        "| layer, format, dtype | step | plain | all cached | nothing cached | outputs |",
        "|---|---|---|---|---|---|",
    )
    for row in cpu["layers"]:
        for step in ("decode", "prefill"):
            times = row[step]
            cells = [f"{times['plain'] * 1e3:.1f}"]
            cells += [
                f"{times[way] * 1e3:.1f} ({times[way] / times['plain']:.2f})" for way in _WAYS[1:]
            ]
            equal = "equal to the bit" if row[f"{step} equal"] else "differ"
            name = f"{row['layer']}, {row['format']}, {row['dtype']}"
            yield f"| {name} | {times['tokens']} tokens | " + " | ".join(cells) + f" | {equal} |"
    yield from ("", "Whole models, tokens a second of the processor:", "")
    yield "| model, dtype | step | plain | all cached | nothing cached | tokens |"
    yield "|---|---|---|---|---|---|"
    for row in cpu["models"]:
        for step in ("decode", "prefill"):
            cells = [f"{row[f'{step} {way}']:,.1f}" for way in _WAYS]
            equal = "the same" if row["equal"] else "differ"
            said = "batch 1" if step == "decode" else f"prompt of {row['prompt']}"
            yield (
                f"| {row['model']}, {row['dtype']} | {said} | "
                + " | ".join(cells)
                + f" | {equal} |"
            )
