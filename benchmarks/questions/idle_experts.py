"""How much of the gain comes from idle experts? Uniform recipes that know them, against ours.

    python -m bitknap.benchmarks.questions.idle_experts benchmarks/results/uniform.json

Writes `idle_experts.md` next to the input.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitknap.allocation import BitPlan, Format, Units, uniform_plans
from bitknap.api.calibration import evaluation_windows, tokenizer_of
from bitknap.api.quantizing import CALIBRATION_TOKENS, default_formats
from bitknap.benchmarks.result_files import claim, read_results, write_report
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.text import BUILTIN, read_text, token_windows
from bitknap.estimators.sweep.expert_recording import recording
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import resolve
from bitknap.quantization.stacks.apply import applied

_LEAST = Format.parse("int1-row-sym")
EXPLANATION = (
    "Experts that saw no token of the calibration text go to 1 bit; all others share one format "
    "(or alternate between two widths of it) at the same total bytes. The remaining difference "
    "to Bitknap is what choosing bits among working experts is worth."
)


@torch.no_grad()
def idle_units(model: Any, layout: Layout, windows: torch.Tensor) -> np.ndarray:
    """Return which units belong to experts that see no tokens, bool [U]."""
    with recording(model, layout) as sums:
        for batch in windows.split(8):
            model(input_ids=batch)
    units = layout.units
    seen = {(n, e): int(c) for n, s in sums.items() for e, c in enumerate(s.count.tolist())}
    keys = zip(units.layer.tolist(), units.expert.tolist(), strict=True)
    return np.array([seen[key] == 0 for key in keys])


def plans_knowing(units: Units, idle: np.ndarray, nbytes: int) -> list[BitPlan]:
    """Return the uniform recipes of all families, idle units at 1 bit, `nbytes` in total."""
    live = np.flatnonzero(~idle)
    working = Units.build(
        layer=units.layer[live],
        role=["routed"] * len(live),
        expert=units.expert[live],
        projection=[units.projections[p] for p in units.projection[live]],
        rows=units.rows[live],
        cols=units.cols[live],
    )
    spent = int(np.sum(_LEAST.nbytes(units.rows[idle], units.cols[idle])))
    whole = []
    for part in uniform_plans(working, default_formats(units), nbytes - spent):
        formats = tuple(dict.fromkeys((*part.formats, _LEAST)))
        choice = np.full(len(units), formats.index(_LEAST), dtype=np.int32)
        choice[live] = part.choice
        whole.append(BitPlan.from_choice(units, formats, choice))
    return whole


def rows_for(name: str, ours: list[dict[str, Any]], tokens: int) -> list[str]:
    folder = resolve(f"reference:{name}")
    model = load(folder, torch.float32)
    layout = walk(model)
    windows = evaluation_windows(folder, BUILTIN, tokens)
    text = read_text(BUILTIN, "calibration")
    length = windows.shape[1]
    calibration = token_windows(tokenizer_of(folder), text, CALIBRATION_TOKENS, length)
    idle = idle_units(model, layout, calibration)
    replay = Replay(model, layout, windows, cache=False)
    lines = []
    for row in ours:
        losses = []
        for plan in plans_knowing(layout.units, idle, row["bytes"]):
            with applied(model, layout, plan):
                losses.append(replay.kl())
        lines.append(
            f"| {name} | {row['budget_bpw']} | {100 * idle.mean():.0f} % | {row['kl']:.5f} | "
            f"{min(losses):.5f} | {row['uniform_kl']:.5f} | {row['kl'] / min(losses):.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="uniform.json")
    args = parser.parse_args()
    claim(parser, args.results.parent, args.results.name, "idle_experts.md")
    document = read_results(args.results)
    if not document:
        parser.exit(2, f"{args.results}: missing; run bitknap.benchmarks.questions.uniform\n")
    rows, tokens = document["rows"], document["about"]["tokens"]
    names = dict.fromkeys(row["model"] for row in rows)
    lines = [
        "# How much of the gain is idle experts?",
        "",
        EXPLANATION,
        "",
        f"KL in nats per token on {tokens:,} tokens of held-out text, same bytes in each row.",
        "",
        "| model | budget | idle units | ours | uniform, idle at 1 bit | uniform | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        lines += rows_for(name, [row for row in rows if row["model"] == name], tokens)
    write_report(args.results.parent / "idle_experts.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
