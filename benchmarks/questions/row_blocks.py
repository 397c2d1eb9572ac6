"""Row blocks, sorted neurons and rotation, each against a plain plan at equal bytes.

    python -m bitknap.benchmarks.questions.row_blocks -o benchmarks/results

writes `row_blocks.json` and `row_blocks.md` for both reference models; with `--models`, rows of
other models are kept. Figures are measured on checkpoints that `quantize` wrote and `load` read.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bitknap.allocation import Budget, formats
from bitknap.api.calibration import evaluation_windows
from bitknap.api.planning import plan_for
from bitknap.api.quantizing import CALIBRATION_TOKENS, estimate, quantize
from bitknap.api.requests import Calibration, Formats
from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.estimators.measuring.kl_replay import Losses, compare, standard_error
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import resolve

BUDGETS = (2.0, 2.5)
FORMATS = formats((1, 2, 3, 4), (64, "row"), (False, True), ("compact",))
WAYS = {
    "plain": Formats(options=FORMATS),
    "4 blocks": Formats(options=FORMATS, row_blocks=4),
    "4 blocks, sorted": Formats(options=FORMATS, row_blocks=4, permute=True),
    "rotated": Formats(options=FORMATS, rotate=True),
}


def rows_for(name: str, tokens: int, calibration: int) -> list[dict[str, Any]]:
    """Return a row for each way and budget, compared with the plain plan."""
    model = f"reference:{name}"
    folder = resolve(model)
    windows = evaluation_windows(folder, "builtin", tokens)
    original = load(folder, torch.float32)
    plain: dict[float, Losses] = {}
    rows = []
    for way, menu in WAYS.items():
        start = time.monotonic()
        table = estimate(model, formats=menu, calibration=Calibration(tokens=calibration))
        seconds = time.monotonic() - start
        for bits in BUDGETS:
            solution = plan_for(table, Budget.bits(bits))
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "out"
                quantize(model, solution.plan, out)
                losses = compare(load(out, torch.float32), original, windows)
            base = plain.setdefault(bits, losses)
            paired = losses.kl - base.kl
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "budget_bpw": bits,
                    "bpw": solution.plan.bpw,
                    "bytes": solution.plan.total_bytes,
                    "predicted_kl": solution.cost,
                    "kl": float(losses.kl.mean()),
                    "kl_se": standard_error(losses.kl),
                    "difference": float(paired.mean()),
                    "difference_se": standard_error(paired),
                    "ratio": float(losses.kl.mean() / base.kl.mean()),
                    "units": len(table.units),
                    "estimate_seconds": round(seconds, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the table of all rows."""
    lines = [
        "# Row blocks, sorted neurons, rotation",
        "",
        f"KL to the original in nats per token on {about['tokens']:,} tokens of held-out text; ± "
        "is the standard error over windows, of the paired difference to the plain plan in its "
        'own column. "Blocks": every expert matrix is cut into 4 blocks of rows, each with its '
        'own format (`--row-blocks 4`). "Sorted": neurons of similar sensitivity are put '
        'together first (`--permute`). "Rotated": the residual stream is rotated by a random '
        "Hadamard transform (`--rotate`), without blocks.",
        "",
        f"torch {about['torch']}, {about['device']}, calibration on "
        f"{about['calibration_tokens']:,} tokens, profile gate_eq_up, rounding to nearest; formats "
        f"{about['formats']}.",
        "",
        "| model | budget | way | units | bpw | KL | − plain | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["model"], r["budget_bpw"])):
        paired = f"{r['difference']:+.5f} ± {r['difference_se']:.5f}"
        lines.append(
            f"| {r['model']} | {r['budget_bpw']} | {r['way']} | {r['units']:,} | {r['bpw']:.3f} | "
            f"{r['kl']:.5f} ± {r['kl_se']:.5f} | {'' if r['way'] == 'plain' else paired} | "
            f"{r['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen3moe"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    args = parser.parse_args()
    claim(parser, args.out, "row_blocks.json", "row_blocks.md")
    rows = [r for m in args.models for r in rows_for(m, args.tokens, args.calibration_tokens)]
    about = {
        "tokens": args.tokens,
        "calibration_tokens": args.calibration_tokens,
        "formats": "1 to 4 bits, groups of 64 and whole rows, with and without zero, compact "
        "metadata",
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
    }
    path = args.out / "row_blocks.json"
    before = read_results(path).get("rows", [])
    rows = [r for r in before if r["model"] not in args.models] + rows
    document = {"about": about, "rows": rows}
    write_results(path, document)
    write_report(args.out / "row_blocks.md", markdown(rows, about))


if __name__ == "__main__":
    main()
