"""The main job on a made-up OLMoE-1B-7B within 6 GiB: memory, time, kills, forecasts.

    python -m bitknap.benchmarks.scale -o benchmarks/results [--layers N] [--folder WORK]

Two jobs are run: the first three layers, killed five times and once undisturbed, which must write
the same bytes; then the whole model, killed five times. What is done is kept in WORK, and the same
command goes on from there. Writes `scale.json` and `scale.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitknap.arguments import add_output
from bitknap.benchmarks.quantize.__main__ import about
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.scale.main_job import Job, forecast, judged, quantized, source_of
from bitknap.benchmarks.scale.report import markdown

MODEL = "OLMoE-1B-7B"
_FEW_LAYERS, _KILLS = 3, 5


def run(
    out: Path, jobs: Sequence[tuple[Job, bool]], folder: Path, say: Callable[[str], None]
) -> None:
    """Run jobs, and write the report on all of them after each step.

    Args:
        out: folder of the results.
        jobs: each with whether it is repeated without kills.
        folder: folder for the models, which is kept.
        say: called with progress messages.
    """
    document: dict[str, Any] = {"about": about(), "jobs": []}
    for job, again in jobs:
        work = folder / f"{job.name}.{job.layers or 'all'}"
        work.mkdir(parents=True, exist_ok=True)
        say(f"{job.name}: making the model")
        source = source_of(job, work)
        row = _facts(job, source)
        document["jobs"].append(row)
        row["quantize"] = quantized(job, source, work / "out", say)
        _write(out, document)
        if again:
            row["undisturbed"] = quantized(replace(job, kills=()), source, work / "again", say)
            _write(out, document)
        row["evaluate"] = judged(job, source, work / "out")
        _write(out, document)


def _facts(job: Job, source: Path) -> dict[str, Any]:
    return {
        "model": job.name,
        "layers": job.layers,
        "source_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "budget": job.budget,
        "max_memory": job.max_memory,
        "judged": job.judged,
        "forecast": forecast(source),
    }


def _write(out: Path, document: dict[str, Any]) -> None:
    before = read_results(out / "scale.json")
    write_results(out / "scale.json", {**before, **document})
    write_report(out / "scale.md", markdown(document))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--model", default=MODEL, help="model whose shapes are used")
    parser.add_argument("--layers", type=int, default=None, help="layers of the large job")
    parser.add_argument("--max-memory", default="6GiB", help="limit of memory")
    parser.add_argument("--tokens", type=int, default=None, help="calibration tokens")
    parser.add_argument("--judged-on", type=int, default=2048, help="held-out tokens")
    parser.add_argument("--minutes", type=float, default=10.0, help="most minutes to a kill")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"), help="for the models")
    parser.add_argument("--small-only", action="store_true", help="only the first three layers")
    given = parser.parse_args(argv)
    claim(parser, given.out, "scale.json", "scale.md")
    whole = Job(
        shape=given.model,
        layers=given.layers,
        max_memory=given.max_memory,
        tokens=given.tokens,
        judged=given.judged_on,
        kills=(60 * given.minutes,) * _KILLS,
    )
    few = replace(whole, layers=_FEW_LAYERS, tokens=512, kills=(60.0,) * _KILLS)
    jobs = [(few, True)] if given.small_only else [(few, True), (whole, False)]
    run(given.out, jobs, given.folder, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
