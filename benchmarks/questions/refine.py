"""The closed loop against evolution with ten times as many plans, on the same model and text.

    python -m bitknap.benchmarks.questions.refine -o benchmarks/results

Ours starts at the calibrated knapsack plan and measures 64 plans. Evolution (EvoPress) measures
640: once as published, over widths of whole rows from a nearly uniform plan, and once over all
formats from the same plan as ours. Writes `refine.json` and `refine.md`; existing results are
kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitknap.allocation import BitPlan, Budget, CostTable, Problem, profile, solve
from bitknap.allocation.published.evopress import Evolution
from bitknap.allocation.refinement.loop import Refine
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.plan_measures import measures
from bitknap.arguments import add_output
from bitknap.benchmarks.compare.judge import bootstrap_error
from bitknap.benchmarks.compare.models import Options, Setting, prepare
from bitknap.benchmarks.compare.strategies import in_rows
from bitknap.benchmarks.compare.tables import CALIBRATED, Tables
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.estimators.measuring.readings import Readings
from bitknap.quiet import silence_transformers

OURS, THEIRS = 64, 640
# Model, bits per weight, and whether evolution also runs from our plan.
CASES = (("mixtral", 2.5, True), ("qwen3moe", 2.5, False), ("mixtral", 2.0, False))
# Number of calibration tokens, the same for all.
_TOKENS = 8192


def rows(setting: Setting, table: CostTable, bits: float, both: bool) -> Iterator[dict[str, Any]]:
    """Yield the results of Bitknap and of evolution at one budget, as JSON values."""
    tied = under(table, profile("free"))
    problem = Problem(tied, [Budget.bits(bits)])
    parts = measures(setting.loop, tied, Readings())
    start = time.perf_counter()
    refined = Refine(parts=parts, evaluations=OURS).run(problem)
    first = refined.steps[0].choice
    plan = refined.solution.plan
    ours = setting.judge.of(plan).kl
    before = setting.judge.of(BitPlan.from_choice(tied.units, tied.formats, first)).kl
    about = {"model": setting.options.model, "bits": bits}
    readings = int(table.provenance["measurements"])
    yield about | {
        "way": "ours, unrefined",
        "plans": readings,
        "seconds": None,
        "seen": float(refined.steps[0].losses.mean()),
        **_unseen(before, ours),
    }
    yield about | {
        "way": "ours",
        "plans": readings + len(refined.steps),
        "seconds": time.perf_counter() - start,
        "seen": float(refined.best.losses.mean()),
        **_unseen(ours, ours),
    }
    rivals: dict[str, tuple[CostTable, tuple[int, ...] | None]] = {
        "evolution": (under(in_rows(table), profile("free")), None)
    }
    if both:
        rivals["evolution from our plan"] = (tied, tuple(first.tolist()))
    for way, (costs, begin) in rivals.items():
        start = time.perf_counter()
        solver = Evolution(parts=parts, evaluations=THEIRS, start=begin, progress=_say)
        theirs = solve(Problem(costs, [Budget.bits(bits)]), solver)
        seen = np.concatenate([part(theirs.choice) for part in parts])
        yield about | {
            "way": way,
            "plans": THEIRS,
            "seconds": time.perf_counter() - start,
            "seen": float(seen.mean()),
            **_unseen(setting.judge.of(theirs.plan).kl, ours),
        }


def _unseen(kl: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    difference = kl - ours
    return {
        "kl": float(kl.mean()),
        "difference": float(difference.mean()),
        "difference_se": bootstrap_error(difference),
    }


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report."""
    lines = [
        "# Refining against evolution",
        "",
        f"KL to the original in nats per token on the {_TOKENS:,} calibration tokens that all "
        f"plans were measured on, and on {document['judged']:,} tokens that nothing saw; ± is the "
        "standard error of the paired difference (block bootstrap). The number of Bitknap's "
        f"plans includes the group readings that its table took. Evolution measures {THEIRS} "
        "plans: all on the first quarter of the text, and the best quarter of each generation on "
        "the rest. As published, it chooses among widths of whole rows, from a nearly uniform "
        "plan. Rounding to nearest, profile free.",
        "",
        "| model | bpw | way | plans measured | seen text | unseen text | − ours | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['model'].partition(':')[2]} | {row['bits']} | {row['way']} | {row['plans']} | "
            f"{row['seen']:.5f} | {row['kl']:.5f} | {row['difference']:+.5f} ± "
            f"{row['difference_se']:.5f} | {seconds} |"
        )
    return "\n".join([*lines, "", "One CPU thread of two; other work was running beside it.", ""])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    args = parser.parse_args()
    claim(parser, args.out, "refine.json", "refine.md")
    silence_transformers()
    path = args.out / "refine.json"
    document: dict[str, Any] = {"rows": []} | read_results(path)
    settings: dict[str, tuple[Setting, CostTable]] = {}
    for name, bits, both in CASES:
        model = f"reference:{name}"
        if any((row["model"], row["bits"]) == (model, bits) for row in document["rows"]):
            continue
        if name not in settings:
            setting = prepare(Options(model=model, refine_tokens=_TOKENS), _say)
            settings[name] = (setting, Tables(setting=setting).of(CALIBRATED))
        setting, table = settings[name]
        document["judged"] = setting.judge.sample.windows.numel()
        document["rows"] += rows(setting, table, bits, both)
        write_results(path, document)
        write_report(args.out / "refine.md", markdown(document))


def _say(what: str, done: int, of: int) -> None:
    print(f"{what} {done}/{of}", flush=True)


if __name__ == "__main__":
    main()
