"""Ours against the best uniform recipe at equal bytes, on text that calibration did not see.

    python -m bitknap.benchmarks.questions.uniform -o benchmarks/results

writes `uniform.json` and `uniform.md` for both reference models.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch

from bitknap.allocation import BitPlan, Budget, Format
from bitknap.api.calibration import evaluation_windows
from bitknap.api.evaluation import best_uniform
from bitknap.api.planning import plan_for
from bitknap.api.quantizing import CALIBRATION_TOKENS, estimate
from bitknap.api.requests import Calibration
from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.estimators.evidence.variant_kl import Replayed
from bitknap.estimators.measuring.kl_replay import Replay, standard_error
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import resolve
from bitknap.quantization.stacks.apply import applied, apply

BUDGETS = (2.0, 2.1, 2.25, 2.5, 3.0, 4.0)


def compare_model(name: str, tokens: int, calibration: int) -> list[dict[str, Any]]:
    """Return one row per budget: our plan and the best uniform recipe at the same bytes."""
    start = time.monotonic()
    table = estimate(f"reference:{name}", calibration=Calibration(tokens=calibration))
    seconds = time.monotonic() - start
    folder = resolve(f"reference:{name}")
    model = load(folder, torch.float32)
    layout = walk(model)
    replay = Replay(model, layout, evaluation_windows(folder, "builtin", tokens), cache=False)
    original = replay.measure()
    rows = []
    for bits in BUDGETS:
        solution = plan_for(table, Budget.bits(bits))
        with applied(model, layout, solution.plan):
            ours = replay.measure()
        recipe, uniform, losses = best_uniform(Replayed(replay), layout, solution.plan.total_bytes)
        paired = losses.kl - ours.kl
        rows.append(
            {
                "model": name,
                "budget_bpw": bits,
                "bytes": solution.plan.total_bytes,
                "bpw": solution.plan.bpw,
                "predicted_kl": solution.cost,
                "gap": solution.gap,
                "kl": float(ours.kl.mean()),
                "kl_se": standard_error(ours.kl),
                "perplexity": ours.perplexity,
                "uniform": recipe,
                "uniform_bytes": uniform.total_bytes,
                "uniform_bpw": uniform.bpw,
                "uniform_kl": float(losses.kl.mean()),
                "uniform_perplexity": losses.perplexity,
                "difference": float(paired.mean()),
                "difference_se": standard_error(paired),
                "ratio": float(ours.kl.mean() / losses.kl.mean()),
                "original_perplexity": original.perplexity,
                "estimate_seconds": round(seconds, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def rounding_rate(name: str) -> float:
    """Return the rate of rounding to one format, int3-g64-sym, in bytes of bf16 per second."""
    model = load(resolve(f"reference:{name}"), torch.float32)
    layout = walk(model)
    start = time.perf_counter()
    apply(model, layout, BitPlan.uniform(layout.units, Format.parse("int3-g64-sym")))
    return float(2 * layout.units.numel.sum() / (time.perf_counter() - start))


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        "# Bitknap against the best uniform recipe",
        "",
        f"KL to the original in nats per token on {about['tokens']:,} tokens of held-out text; ± "
        "is the standard error over windows, of the paired difference in its own column. The "
        "uniform recipe is the best of all widths, group sizes, zero points and metadata, pure "
        "or mixed round robin, chosen on this very text, at the bytes of Bitknap's plan or more.",
        "",
        f"torch {about['torch']}, {about['device']}, calibration on "
        f"{about['calibration_tokens']:,} tokens, profile gate_eq_up. "
        "Rounding to one format, clipping search "
        f"and all, takes {about['rounding_bytes_per_second'] / 1e6:.0f} MB of bf16 weights a "
        "second.",
        "",
        "| model | budget | bpw | KL ours | KL uniform | ratio | uniform − ours | uniform recipe | "
        "its bpw | perplexity: original, ours, uniform |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['budget_bpw']} | {r['bpw']:.3f} | "
            f"{r['kl']:.5f} ± {r['kl_se']:.5f} | {r['uniform_kl']:.5f} | **{r['ratio']:.2f}** | "
            f"{r['difference']:.5f} ± {r['difference_se']:.5f} | {r['uniform']} | "
            f"{r['uniform_bpw']:.3f} | {r['original_perplexity']:.2f}, "
            f"{r['perplexity']:.2f}, {r['uniform_perplexity']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen3moe"])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    args = parser.parse_args()
    claim(parser, args.out, "uniform.json", "uniform.md")
    rows = [r for m in args.models for r in compare_model(m, args.tokens, args.calibration_tokens)]
    about = {
        "tokens": args.tokens,
        "calibration_tokens": args.calibration_tokens,
        "rounding_bytes_per_second": round(rounding_rate(args.models[0])),
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_results(args.out / "uniform.json", {"about": about, "rows": rows})
    write_report(args.out / "uniform.md", markdown(rows, about))


if __name__ == "__main__":
    main()
