"""What the default main job takes on published models, one decoder layer at a time: forecasts.

    python -m bitknap.benchmarks.large_models -o benchmarks/results

Only headers are made up, in the models' own shapes; nothing is measured. The machine is the typical
one of two cores, on which `inspect` without `--probe` counts. Writes `large_models.json` and
`large_models.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitknap.api.forecasts.forecasting import STEPS, forecast
from bitknap.api.forecasts.machine import TYPICAL
from bitknap.arguments import add_output
from bitknap.benchmarks.models.random_checkpoint import without_weights
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint

MODELS = ("OLMoE-1B-7B", "Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V3")
# Judging is a command of its own.
JOB = tuple(step for step in STEPS if step != "evaluate")


def job_on(model: str) -> dict[str, Any]:
    """Return what `bitknap quantize MODEL --budget B --max-memory` takes, as JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        source = Checkpoint.open(without_weights(model, Path(folder) / model))
        layout = walk_headers(source.config, source.shapes)
        steps = [
            one
            for one in forecast(source, layout, TYPICAL)
            if one.residency == "by layer" and one.step in JOB
        ]
        return {
            "model": model,
            "source_bytes": source.nbytes,
            "memory_bytes": max(one.memory_bytes for one in steps),
            "seconds": {one.step: round(one.seconds) for one in steps},
        }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the report."""
    lines = [
        "# The main job on models that do not fit in memory: forecasts",
        "",
        "What `bitknap quantize MODEL --budget B` takes with the default estimator, 8,192 tokens "
        "and a `--max-memory` that the model does not fit, so that it goes one decoder layer at a "
        f"time. Forecasts of `inspect` for a typical machine of {TYPICAL.cores} cores without a "
        "GPU, from the models' shapes alone; [how good they are](forecast.md). Hours, without "
        "evaluating.",
        "",
        f"| model | bf16 | peak memory | hours | {' | '.join(JOB)} |",
        "|---|---:|---:|---:|" + "---:|" * len(JOB),
    ]
    for row in rows:
        hours = {step: seconds / 3600 for step, seconds in row["seconds"].items()}
        parts = " | ".join(f"{hours[step]:.1f}" for step in JOB)
        sizes = [f"{row[key] / 2**30:.1f} GiB" for key in ("source_bytes", "memory_bytes")]
        lines.append(
            f"| {row['model']} | {' | '.join(sizes)} | {sum(hours.values()):.1f} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Forecast and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    out = parser.parse_args().out
    claim(parser, out, "large_models.json", "large_models.md")
    rows = list(map(job_on, MODELS))
    write_results(out / "large_models.json", {"machine": asdict(TYPICAL), "jobs": rows})
    write_report(out / "large_models.md", markdown(rows))


if __name__ == "__main__":
    main()
