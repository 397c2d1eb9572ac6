"""What the benchmark of scale found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitknap.allocation.problem.budget import human, parse_size

REPEAT = "python -m bitknap.benchmarks.scale -o benchmarks/results"


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report on the measurements in a document."""
    lines = [
        "# The main job on a model that does not fit in memory",
        "",
        f"Repeat it with `{REPEAT}`.",
        "",
        _about(document["about"]),
    ]
    for job in document["jobs"]:
        lines += ["", f"## {_title(job)}", "", *_job(job)]
    return "\n".join(lines) + "\n"


def _about(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"{about['cores']} cores, {about['threads']} threads; {versions}."


def _title(job: Mapping[str, Any]) -> str:
    layers = "all layers" if job["layers"] is None else f"its first {job['layers']} layers"
    return f"{job['model']}, {layers}, {human(job['source_bytes'])} in bf16"


def _job(job: Mapping[str, Any]) -> list[str]:
    runs: Sequence[Mapping[str, Any]] = job["quantize"]["runs"]
    limit, peak = parse_size(job["max_memory"]), max(run["peak_bytes"] for run in runs)
    seconds, killed = sum(run["seconds"] for run in runs), sum(run["killed"] for run in runs)
    within = "within" if peak <= limit else "above"
    said = [
        f"`bitknap {' '.join(job['quantize']['words'])}`",
        "",
        f"took {_time(seconds)} in all and {human(peak)} at its peak, {within} the limit; it was "
        f"killed {killed} times on the way. The files that it wrote have the digest "
        f"{job['quantize']['digest']}.",
    ]
    if job.get("undisturbed"):
        same = job["undisturbed"]["digest"] == job["quantize"]["digest"]
        said += [
            "",
            f"A run that nothing disturbed took {_time(job['undisturbed']['runs'][-1]['seconds'])} "
            f"and wrote {'the same bytes' if same else 'OTHER BYTES'}.",
        ]
    if job.get("evaluate"):
        judge = job["evaluate"]
        said += [
            "",
            f"`bitknap evaluate --uniform` on {job['judged']:,} tokens took "
            f"{_time(judge['seconds'])} and {human(judge['peak_bytes'])}.",
        ]
    said += [
        "",
        "`bitknap inspect` had forecast:",
        "",
        "| step | memory | time |",
        "|---|---:|---:|",
    ]
    for step in job["forecast"]:
        said.append(
            f"| {step['name']} | {human(step['memory_bytes'])} | {_time(step['seconds'])} |"
        )
    return said


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
